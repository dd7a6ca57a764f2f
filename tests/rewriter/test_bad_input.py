"""Bad input: each a clear error that names its place, or the declared mask; no parameter ever NaN."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import nn

from rewriter import BlackBox, BoxError, CallableBox, OnnxBox, Plan, RewriteError, RewriteWarning, rewrite


class Net(nn.Module):
    def __init__(self, box, width=4):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.box, self.after = nn.Linear(3, 4), box, nn.Linear(width, 3)

    def forward(self, x):
        return self.after(self.box(self.before(x)))


def batch(rows=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, generator=generator), torch.randint(0, 3, (rows,), generator=generator)


def build(function, **options):
    """A step around a box of `function`; the box's options and the entry's are told apart by name."""
    own = {key: options.pop(key) for key in ("nonfinite", "per_row", "name") if key in options}
    box = CallableBox(function, **own)
    return rewrite(Net(box), BlackBox("box", **options), loss=F.cross_entropy)


def sine(x):
    return np.sin(x)


class Turns:
    """Behaves for `good` calls after it was armed, then does what `bad` does."""

    def __init__(self, bad, good=0):
        self.bad, self.left, self.__name__ = bad, None, "turns"
        self.good = good

    def arm(self):
        self.left = self.good

    def __call__(self, x):
        if self.left is None:
            return np.sin(x)
        self.left -= 1
        return self.bad(x) if self.left < 0 else np.sin(x)


def fails(x):
    raise ValueError("no solution found")


# NaN.


def nan_where(share):
    """NaN on about this share of all points, decided by the point."""

    def box(x):
        y = np.sin(x)
        y[(np.abs(x).sum(1) * 1e6) % 1 < share] = np.nan
        return y

    return box


def test_nan_outputs_raise_by_default_with_the_boxs_name():
    step = build(nan_where(1.0), name="solver")
    with pytest.raises(BoxError) as caught:
        step(batch()[0])
    assert "16 of 16 rows of output 0 of solver" in caught.value.what
    assert "nonfinite=" in caught.value.remedy


def test_nan_after_training_started():
    box = Turns(lambda x: np.sin(x) * np.nan)
    step = build(box, probes=2)
    step(batch()[0], target=batch()[1]).backward()
    box.arm()
    with pytest.raises(BoxError, match="rows of output 0 of turns"):
        step(batch()[0])


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_masked_rows_never_reach_a_parameter(share):
    step = build(nan_where(share), nonfinite="zero", probes=4, max_failed=0.9)
    optimizer = torch.optim.Adam(step.parameters(), 1e-2)
    for seed in range(50):
        x, y = batch(seed=seed)
        step(x, target=y).backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in step.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.isfinite(parameter).all() for parameter in step.parameters())
    counts = step.ledger["box"]
    assert 0.8 * share * counts.forward < counts.failed < 1.2 * share * counts.queries


def test_a_masked_row_has_no_gradient_and_the_others_their_own():
    """Rows 0 and 1 fail in forward: their inputs get zero, the rest what a healthy box gives."""

    def lame(x):
        y = np.sin(x)
        y[:2] = np.nan if len(x) == 16 else y[:2]
        return y

    def gradient(function):
        step = build(function, nonfinite="zero", probes=4, step_size=1e-3, input_scale=1.0, clip=None)
        x = batch()[0].requires_grad_()
        return torch.autograd.grad(step(x).sum(), x)[0]

    masked, healthy = gradient(lame), gradient(sine)
    assert torch.equal(masked[:2], torch.zeros(2, 3))
    assert torch.equal(masked[2:], healthy[2:])
    assert healthy[:2].abs().max() > 0.01


@pytest.mark.parametrize("share", [0.25, 0.9])
def test_failing_probes_are_masked_up_to_the_declared_share(share):
    """Forward is clean; only the probes' points fail, and past `max_failed` backward raises."""
    box = Turns(nan_where(share))
    step = build(box, nonfinite="zero", probes=4, step_size=1e-2, input_scale=1.0, clip=None)
    x, y = batch()
    loss = step(x, target=y)
    box.arm()
    if share > 0.5:
        with pytest.raises(RewriteError, match=r"of the queries of a black box failed[\s\S]*max_failed = 50%"):
            loss.backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in step.parameters())
    else:
        loss.backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in step.parameters())
        assert 0 < step.ledger["box"].failed < 0.5 * step.ledger["box"].probes


def test_a_nan_cotangent_is_passed_on():
    """Loss scalers rely on it."""
    step = build(sine, probes=2)
    x, y = batch()
    (step(x, target=y) * float("nan")).backward()
    assert torch.isnan(step.before.weight.grad).all()


# Files, shapes, dtypes.


@pytest.fixture
def wide(tmp_path):
    """y = x + x on (rows, 7)."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 7]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "graph", values[:1], values[1:])
    path = tmp_path / "wide.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return path


def test_a_missing_or_corrupt_file_is_named_at_construction(wide, tmp_path):
    with pytest.raises(BoxError, match=r"forest\.onnx"):
        OnnxBox(tmp_path / "forest.onnx")
    wide.write_bytes(wide.read_bytes()[:-20])
    with pytest.raises(BoxError, match=r"wide\.onnx"):
        OnnxBox(wide)


@pytest.mark.parametrize("example", [True, False])
def test_a_wrong_width_is_told_in_words(wide, example):
    model = Net(OnnxBox(wide), 7)
    x = batch()[0]
    with pytest.raises(BoxError, match=r"input x of wide.onnx does not fit: dimension 1 is fixed at 7, got 4"):
        rewrite(model, BlackBox("box"), **({"example": (x,)} if example else {}))(x)


def test_a_wrong_dtype_is_told_in_words(wide):
    class Integers(Net):
        def forward(self, x):
            return self.after(self.box(self.before(x).round().long().repeat(1, 2)[:, :7]))

    with pytest.raises(BoxError, match=r"input 0 of wide.onnx must be .*float.* got .*int"):
        rewrite(Integers(OnnxBox(wide), 7), BlackBox("box"), example=(batch()[0],))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (lambda x: np.sin(x)[:, :3], "returned rows of float64 (3,) where others are float64 (4,)"),
        (lambda x: np.sin(x)[:-1], "returned an output 0 of shape (0, 4) for 1 row of input"),
        (lambda x: (np.sin(x), np.cos(x)), "returned rows of float64 (4,), float64 (4,) where others are float64 (4,)"),
        (lambda x: np.sin(x).astype(str), "returned an array of <U32 as output 0"),
        (fails, "raised ValueError: no solution found"),
    ],
    ids=["width", "rows", "number", "text", "exception"],
)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_box_that_goes_bad_later(bad, reason, where):
    """Every row is masked: an error in forward, and past `max_failed` in backward."""
    box = Turns(bad)
    step = build(box, probes=2)
    x, y = batch()
    step(x, target=y).backward()
    before = [parameter.grad.clone() for parameter in step.parameters()]
    loss = step(x, target=y) if where == "backward" else None
    box.arm()
    message = (
        "16 of 16 rows of output 0 of turns" if where == "forward" else "100% of the queries of a black box failed"
    )
    with pytest.raises(RewriteError, match=message):
        loss.backward() if loss is not None else step(x, target=y)
    assert step.model.box.last_failure.startswith(f"row 0 {reason}")
    if where == "forward":
        assert all(map(torch.equal, before, (parameter.grad for parameter in step.parameters())))
    box.left = None
    step(x, target=y).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in step.parameters())


@pytest.mark.parametrize("example", [True, False])
def test_a_box_that_raises_at_once(example):
    with pytest.raises(BoxError, match="fails raised ValueError: no solution found"):
        rewrite(Net(CallableBox(fails)), BlackBox("box"), **({"example": (batch()[0],)} if example else {}))(batch()[0])


def test_a_box_that_raises_on_some_points_is_masked_where_declared():
    def picky(x):
        if (x.sum(1) < -1.5).any():
            raise ValueError("out of domain")
        return np.sin(x)

    step = build(picky, nonfinite="zero", probes=4, max_failed=0.9)
    x, y = batch()
    for _ in range(3):
        step(x, target=y).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in step.parameters())
    assert step.ledger["box"].failed > 0


def test_the_models_own_error_is_the_news():
    """A model that fails in eager fails with its own words, not with those of capture."""
    step = rewrite(Net(CallableBox(sine)), BlackBox("box"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        step(torch.randn(4, 5))
    step(batch()[0])


# Plans.


def test_an_uncovered_box_is_an_error_that_names_the_entry():
    with pytest.raises(RewriteError, match=r'add BlackBox\("box"\)'):
        rewrite(Net(CallableBox(sine)), Plan([]), example=(batch()[0],))


def test_a_box_inside_vmap():
    class Mapped(Net):
        def forward(self, x):
            return self.after(torch.vmap(lambda row: self.box(row.unsqueeze(0)).squeeze(0))(self.before(x)))

    model = Mapped(CallableBox(sine))
    with pytest.raises(RewriteError, match="vmap"):
        rewrite(model, BlackBox("box"), example=(batch()[0],))
    with pytest.raises(BoxError, match="vmap"):
        model(batch()[0])


def test_overlapping_entries():
    model = Net(nn.Sequential(CallableBox(sine), nn.Tanh()))
    for plan in (["box", "box.0"], ["box.0", "box"], ["box", "box"]):
        with pytest.raises(RewriteError, match=r"another entry of the plan|two plan entries"):
            rewrite(model, [BlackBox(target) for target in plan], example=(batch()[0],))


def test_a_module_around_a_box_is_no_ordinary_module():
    """Nothing simpler would do: autograd cannot cross the box inside (a warning would be an error here)."""
    step = rewrite(Net(nn.Sequential(CallableBox(sine), nn.Tanh())), BlackBox("box"), example=(batch()[0],))
    assert "simpler: this is an ordinary module" not in step.explain()


def test_a_constant_box_is_a_warning_and_then_an_error():
    step = build(lambda x: np.ones_like(x), name="constant")
    x, y = batch()
    with pytest.warns(RewriteWarning, match="no probe changed any output of constant"):
        step(x, target=y).backward()

    def go_on():
        for _ in range(50):
            step(x, target=y).backward()

    with pytest.raises(RewriteError, match=r"no probe changed any output[\s\S]*constant"):
        go_on()
    assert all(torch.isfinite(parameter.grad).all() for parameter in step.parameters())


def test_a_batch_without_rows():
    step = build(sine, probes=2)
    step(batch()[0])
    x = torch.zeros(0, 3)
    output = step(x)
    assert output.shape == (0, 3)
    output.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in step.before.parameters())
