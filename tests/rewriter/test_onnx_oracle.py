"""A box with a known derivative: an ONNX file exported from a torch module, trained through, against autograd on the
module itself. The step size is automatic."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter import BlackBox, CallableBox, OnnxBox, Plan, rewrite

WIDTH, OUTPUTS, ROWS = 64, 12, 512


@pytest.fixture(scope="module")
def twin():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, OUTPUTS)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def path(twin, tmp_path_factory):
    pytest.importorskip("onnxscript")
    file = tmp_path_factory.mktemp("oracle") / "twin.onnx"
    batch = torch.export.Dim("batch")
    torch.onnx.export(twin, (torch.randn(4, WIDTH),), file, dynamo=True, verbose=False, dynamic_shapes=({0: batch},))
    return file


class Model(nn.Module):
    def __init__(self, box):
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Linear(20, WIDTH)
        self.box = box
        self.head = nn.Linear(OUTPUTS, 5)

    def forward(self, x):
        return self.head(self.box(self.encoder(x)))


def row_gradients(model, forward) -> Tensor:
    """Gradient of the loss at the input of the box, (rows, width)."""
    torch.manual_seed(2)
    x, y = torch.randn(ROWS, 20), torch.randint(0, 5, (ROWS,))
    kept = []

    def keep(module, inputs, output):
        output.retain_grad()
        kept.append(output)

    handle = model.encoder.register_forward_hook(keep)
    forward(x, y).backward()
    handle.remove()
    return kept[-1].grad


def compared(path, twin, **options):
    """Mean row cosine and the slope <estimate, exact> / <exact, exact>."""
    eager = Model(twin)
    exact = row_gradients(eager, lambda x, y: F.cross_entropy(eager(x), y))
    boxed = Model(OnnxBox(path))
    step = rewrite(boxed, Plan([BlackBox("box", **options)]), loss=F.cross_entropy)
    found = row_gradients(boxed, lambda x, y: step(x, target=y))
    cosine = F.cosine_similarity(found, exact, dim=1).mean()
    return float(cosine), float((found * exact).sum() / (exact * exact).sum()), step


@pytest.mark.parametrize("difference", ["forward", "central"])
def test_as_many_probes_as_inputs_are_exact(path, twin, difference):
    cosine, slope, _ = compared(path, twin, probes=WIDTH, difference=difference)
    assert cosine > 0.999
    assert abs(slope - 1) < 0.01


def test_an_eighth_of_the_probes(path, twin):
    cosine, slope, step = compared(path, twin, probes=WIDTH // 8)
    assert abs(cosine - math.sqrt(1 / 8)) < 0.02
    assert abs(slope - 1) < 0.05
    assert abs(step.quality["box"].predicted_cosine - math.sqrt(1 / 8)) < 1e-6


def test_the_comparison_can_fail(path, twin):
    """A step ten thousand times too large gives another gradient."""
    cosine, slope, _ = compared(path, twin, probes=WIDTH, step_size=1e2)
    assert cosine < 0.99 or abs(slope - 1) > 0.1


def test_a_simulators_own_parameter_is_fitted():
    """A shared input without rows: y = sin(frequency x), frequency trained through the box alone."""

    def simulate(x, frequency):
        import numpy

        return numpy.sin(x * frequency)

    class Fit(nn.Module):
        def __init__(self):
            super().__init__()
            self.frequency = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
            self.box = CallableBox(simulate, shared=(1,))

        def forward(self, x):
            return self.box(x, self.frequency)

    torch.manual_seed(0)
    x = torch.rand(64, 1, dtype=torch.float64) * 2
    model = Fit()
    step = rewrite(model, Plan([BlackBox("box")]), loss=F.mse_loss)
    optimizer = torch.optim.Adam(step.parameters(), lr=0.05)
    for _ in range(200):
        step(x, target=torch.sin(1.7 * x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert abs(float(model.frequency) - 1.7) < 1e-3


def test_scaled_losses_skip_an_overflow_and_go_on(path):
    """GradScaler: an infinite cotangent comes back non-finite, so the step is skipped; then training goes on."""
    model = Model(OnnxBox(path))
    step = rewrite(model, Plan([BlackBox("box")]), loss=F.cross_entropy)
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    x, y = torch.randn(32, 20), torch.randint(0, 5, (32,))
    before = model.encoder.weight.detach().clone()
    for factor, moved in ((float("inf"), False), (1.0, True)):
        scaler.scale(step(x, target=y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.isfinite(model.encoder.weight).all()
        assert torch.equal(model.encoder.weight, before) is not moved
    assert scaler.get_scale() == 8.0


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_box_under_checkpoint(path, reentrant):
    from torch.utils.checkpoint import checkpoint

    def gradient(wrapped):
        model = Model(OnnxBox(path))
        step = rewrite(model, Plan([BlackBox("box", step_size=1e-3, input_scale=1.0)]), loss=F.cross_entropy)
        torch.manual_seed(3)
        x, y = torch.randn(32, 20, requires_grad=True), torch.randint(0, 5, (32,))
        wrapped(lambda x, y: step(x, target=y), x, y).backward()
        return model.encoder.weight.grad

    plain = gradient(lambda call, x, y: call(x, y))
    under = gradient(lambda call, x, y: checkpoint(call, x, y, use_reentrant=reentrant))
    assert torch.equal(plain, under)
