import numpy as np
import pytest
import torch
from array_box import ArrayBox, cosine, gradient, relative_error, slope

import rewriter.runtime.estimators.step_size as module
from rewriter import RewriteWarning
from rewriter.runtime.black_box import BlackBoxRule
from rewriter.runtime.errors import RewriteError

RANDOM = np.random.default_rng(0)
INNER, OUTER = RANDOM.standard_normal((16, 64)) / 4, RANDOM.standard_normal((64, 12)) / 8
MATRIX = RANDOM.standard_normal((16, 12)) / 4
X = torch.from_numpy(RANDOM.standard_normal((128, 16)))
V = torch.from_numpy(RANDOM.standard_normal((128, 12)))


def estimate(function, true, x=X, dtype=torch.float64, **options):
    """The rule after one backward with every coordinate's worth of probes, its gradient, and the true one."""
    weights = [torch.from_numpy(array) for array in (INNER, OUTER, MATRIX)]
    leaf = x.double().clone().requires_grad_()
    (exact,) = torch.autograd.grad((true(leaf, *weights) * V).sum(), leaf)
    box = ArrayBox(function, dtype)
    rule = BlackBoxRule(box, probes=16, **options)
    (found,) = gradient(rule, x, v=V)
    assert rule.ledger.total("step_size") <= 110
    assert rule.ledger.total("queries") == box.rows
    return rule, found, exact


def net(a):
    return np.tanh(a @ INNER.astype(a.dtype)) @ OUTER.astype(a.dtype)


def torch_net(x, inner, outer, _):
    return torch.tanh(x @ inner) @ outer


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smooth_network(difference, dtype):
    rule, found, true = estimate(net, torch_net, dtype=dtype, difference=difference)
    assert rule.describe()["kind"] == "smooth"
    assert float(cosine(found, true).min()) > 0.999
    assert slope(found, true) == pytest.approx(1, abs=0.01)
    assert relative_error(found, true) < (2e-3 if dtype == torch.float32 else 1e-6) ** 2


def test_forward_and_central_differences_want_different_steps():
    forward, central = (
        estimate(net, torch_net, dtype=torch.float32, difference=name)[0] for name in ("forward", "central")
    )
    assert forward.describe()["step_size"] < central.describe()["step_size"]


@pytest.mark.parametrize("unit", [1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3])
@pytest.mark.parametrize("name", ["sin", "exp"])
def test_six_decades_of_input_scale(unit, name):
    _, found, true = estimate(
        lambda a: getattr(np, name)(a / unit @ MATRIX),
        lambda x, _, __, matrix: getattr(torch, name)(x / unit @ matrix),
        x=X * unit,
    )
    assert float(cosine(found, true).min()) > 0.999
    assert slope(found, true) == pytest.approx(1, abs=0.01)
    # negative control: the step that suits one unit is wrong for another
    if unit in (1e-3, 1e3):
        fixed = {"step_size": 1e-2 if unit < 1 else 1e-13, "input_scale": 1.0, "clip": None}
        _, found, _ = estimate(
            lambda a: getattr(np, name)(a / unit @ MATRIX),
            lambda x, *_: x @ torch.from_numpy(MATRIX),
            x=X * unit,
            **fixed,
        )
        assert relative_error(found, true) > 1e-4


@pytest.mark.parametrize(("decimals", "tolerance"), [(6, 0.005), (4, 0.02), (3, 0.05)])
def test_rounded_outputs(decimals, tolerance):
    """Zeros agree with zeros at steps below the rounding: without the guard one of those would be taken."""
    rule, found, true = estimate(lambda a: np.round(net(a), decimals), torch_net)
    assert rule.describe()["kind"] == "smooth"
    assert relative_error(found, true) < tolerance**2
    assert slope(found, true) == pytest.approx(1, abs=0.01)
    fixed = {"step_size": 1e-11, "input_scale": 1.0, "clip": None}
    with pytest.warns(RewriteWarning, match="no probe changed any output"):
        _, found, _ = estimate(lambda a: np.round(net(a), decimals), torch_net, **fixed)
    assert not found.any()


def test_stiff_offset_and_half_precision_boxes():
    _, found, true = estimate(lambda a: np.sin(50 * (a @ MATRIX)), lambda x, _, __, m: torch.sin(50 * (x @ m)))
    assert relative_error(found, true) < 1e-6
    _, found, true = estimate(
        lambda a: np.sin((a - 1e4) @ MATRIX), lambda x, _, __, m: torch.sin((x - 1e4) @ m), x=X + 1e4
    )
    assert relative_error(found, true) < 1e-6
    rule, found, true = estimate(lambda a: net(a.astype(np.float32)).astype(np.float16), torch_net, dtype=torch.float16)
    assert rule.describe()["kind"] == "smooth"
    assert relative_error(found, true) < 0.05**2


def test_outputs_that_never_move_do_not_stop_the_measurement():
    """Of ReLU outputs some are dead in every row; the live ones have a plateau."""
    rule, found, true = estimate(
        lambda a: np.maximum(a @ MATRIX, 0), lambda x, _, __, m: torch.relu(x @ m), difference="central"
    )
    assert rule.describe()["kind"] == "smooth"
    assert slope(found, true) == pytest.approx(1, abs=0.01)


def test_failed_large_steps_are_no_evidence():
    """A box with a domain: NaN beyond it."""

    def logarithm(a):
        with np.errstate(invalid="ignore"):
            return np.log(a @ np.abs(MATRIX))

    _, found, true = estimate(logarithm, lambda x, _, __, m: torch.log(x @ m.abs()), x=X.abs() + 0.1)
    assert relative_error(found, true) < 1e-6


def test_noisy_boxes_are_rough_and_clipped():
    noise = np.random.default_rng(1)
    rule, *_ = estimate(lambda a: net(a) + 0.1 * noise.standard_normal((len(a), 12)), torch_net)
    assert rule.describe()["kind"] == "rough"
    assert rule.quality.clipped > 0


def test_measured_again_when_the_inputs_drift():
    box = ArrayBox(net)
    rule = BlackBoxRule(box)
    spent = []
    for step in range(60):
        gradient(rule, X * (1 if step < 20 else 10), v=V, step=step)
        spent.append(rule.ledger.total("step_size"))
    assert spent[0] == spent[19] > 0
    assert spent[-1] > spent[19]
    assert rule.ledger.total("queries") == box.rows


@pytest.fixture(scope="module")
def forest():
    """The random forest of the demo as a numpy function."""
    ensemble = pytest.importorskip("sklearn.ensemble")
    random = np.random.default_rng(0)
    rows = random.standard_normal((4000, 16)).astype(np.float32)
    inner, outer = random.standard_normal((16, 16)), random.standard_normal((16, 12))
    fitted = ensemble.RandomForestRegressor(n_estimators=60, max_depth=8, random_state=0)
    fitted.fit(rows, np.tanh(rows @ inner) @ outer)
    trees = [estimator.tree_ for estimator in fitted.estimators_]

    def predict(x):
        total = np.zeros((len(x), 12), np.float32)
        for tree in trees:
            total += tree.value[tree.apply(x), :, 0].astype(np.float32)
        return total / len(trees)

    return predict


@pytest.mark.parametrize("seed", range(3))
def test_forest_step_follows_inputs_that_grow(forest, seed):
    """Inputs start with deviation .14 and grow to .8: the step settles in .1 .. .6 and moves up with them."""
    random = np.random.default_rng(seed)
    box = ArrayBox(forest, torch.float32)
    rule = BlackBoxRule(box)
    steps = []
    for step in range(150):
        x = torch.from_numpy(random.standard_normal((128, 16)) * (0.14 + 0.66 * min(1, step / 100))).float()
        gradient(rule, x, v=V.float(), step=step)
        steps.append(rule.describe()["absolute_step"])
    assert rule.describe()["kind"] == "piecewise-constant"
    assert 0.08 < np.median(steps[20:40]) < 0.5
    assert 0.2 < np.median(steps[-30:]) < 0.7
    assert np.median(steps[-30:]) > np.median(steps[20:40])
    assert 0 < rule.quality.clipped < 0.3
    assert rule.ledger.total("queries") == box.rows
    assert rule.ledger.total("step_size") < 0.05 * box.rows


def test_the_threshold_is_where_95_percent_change(forest):
    box = ArrayBox(forest, torch.float32)
    rule = BlackBoxRule(box)
    x = torch.from_numpy(np.random.default_rng(5).standard_normal((128, 16))).float()
    for step in range(400):
        gradient(rule, x, v=V.float(), step=step)
    threshold = rule._estimators["rows"].step.threshold
    fixed = BlackBoxRule(box, step_size=threshold, input_scale=rule._estimators["rows"].scale.typical, clip=None)
    for step in range(20):
        gradient(fixed, x, v=V.float(), step=step)
    assert fixed.quality.changed == pytest.approx(module.CHANGED_TARGET, abs=0.04)


def backwards(rule, x, v, steps):
    return [gradient(rule, x, v=v, step=step)[0] for step in steps]


def test_a_step_that_changes_nothing_grows_until_it_does():
    """Stairs five units away from inputs that are all zero, whose unit is therefore one."""
    rule = BlackBoxRule(ArrayBox(lambda a: np.floor(a[:, :1] / 10 + 0.5)))
    with pytest.warns(RewriteWarning, match="no probe changed any output"):
        found = backwards(rule, torch.zeros(64, 2, dtype=torch.float64), torch.ones(64, 1), range(19))
    assert not found[0].any()
    assert found[-1][:, 0].any()
    assert rule.describe()["absolute_step"] > 1


@pytest.mark.parametrize("step_size", ["auto", 1e-3])
def test_a_constant_box_is_a_warning_and_then_an_error(step_size):
    rule = BlackBoxRule(ArrayBox(lambda a: np.ones((len(a), 3))), step_size=step_size)
    v = torch.ones(128, 3)
    with pytest.warns(RewriteWarning, match="no probe changed any output") as caught:
        found = backwards(rule, X, v, range(19))
    assert len(caught) == 1
    assert not torch.cat(found).any()
    with pytest.raises(RewriteError, match="20 consecutive backwards"):
        gradient(rule, X, v=v, step=19)


def test_silence_is_forgotten_by_one_backward_that_sees_a_change():
    calls = []

    def box(a):
        calls.append(1)
        return a if len(calls) % 30 == 2 else np.zeros_like(a)

    with pytest.warns(RewriteWarning):
        backwards(BlackBoxRule(ArrayBox(box), step_size=1e-3, clip=None), X, torch.ones(128, 16), range(60))
