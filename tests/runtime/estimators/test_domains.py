"""Bounds, whole numbers and positive numbers: where probes go, and that their mean stays the gradient."""

import math

import numpy as np
import pytest
import torch
from array_box import ArrayBox, gradient, relative_error, slope

from rewriter.runtime.black_box import BlackBoxRule
from rewriter.runtime.boxes import CallableBox
from rewriter.runtime.domain import Domain
from rewriter.runtime.errors import BoxError, RewriteError
from rewriter.runtime.estimators.coordinates import Coordinates

WIDTH = 6
MATRIX = np.random.default_rng(1).standard_normal((WIDTH, 4))
V = torch.from_numpy(np.random.default_rng(2).standard_normal((4000, 4)))
INSIDE = 0.5 * torch.ones(4000, WIDTH, dtype=torch.float64)
AT_BOUNDS = torch.tensor([0.0, 1.0, 0.0, 0.5, 1.0, 0.02], dtype=torch.float64).repeat(
    4000, 1
)  # two sides, and near one
TRUE = V @ torch.from_numpy(MATRIX).T
NUMBERS = {"step_size": 0.1, "input_scale": 1.0, "clip": None}
UNIT = {0: Domain(low=0.0, high=1.0)}


class Watched(ArrayBox):
    """Remembers the least and the largest input that it was given."""

    def __init__(self, function, domains):
        super().__init__(function)
        self.domains, self.seen = domains, []

    def evaluate(self, *inputs):
        self.seen += [inputs[0].min().item(), inputs[0].max().item()]
        return super().evaluate(*inputs)


def linear(x):
    return x @ MATRIX


def mean_gradient(x, domains, function=linear, v=V, **options):
    box = Watched(function, domains)
    (found,) = gradient(BlackBoxRule(box, **{**NUMBERS, **options}), x, v=v)
    return found, box


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("directions", ["orthogonal", "rademacher", "gaussian", "coordinate"])
@pytest.mark.parametrize("probes", [1, 3])
def test_no_probe_leaves_the_bounds_and_the_mean_is_the_gradient(directions, probes, difference):
    same = V[:1].repeat(4000, 1)
    true = same[0] @ torch.from_numpy(MATRIX).T
    found, box = mean_gradient(
        AT_BOUNDS, UNIT, v=same, directions=directions, probes=probes, difference=difference, reconstruction="average"
    )
    assert min(box.seen) >= 0
    assert max(box.seen) <= 1
    error = found.mean(0) - true
    noise = found.std(0) / math.sqrt(4000)
    assert (error.abs() < 4.5 * noise + 1e-9).all()


def test_without_a_domain_probes_leave_the_bounds():
    _, box = mean_gradient(AT_BOUNDS, {}, directions="orthogonal")
    assert min(box.seen) < 0
    assert max(box.seen) > 1


def test_turning_elements_of_other_directions_would_leak():
    """The negative control: what coordinates near bounds are for."""
    drawn = np.random.default_rng(3).standard_normal((4000, 1, WIDTH))
    coordinates = Coordinates.of((0,), (WIDTH,), UNIT, "", np.dtype(np.float64))
    assert coordinates is not None
    offsets, turned = coordinates.mirror(AT_BOUNDS.numpy(), 0.1 * drawn)
    assert turned is not None
    directions = offsets / 0.1
    slopes = np.einsum("nkd,d->nk", directions, TRUE[0].numpy())
    error = (directions * slopes[:, :, None]).sum(1).mean(0) - TRUE[0].numpy()
    assert np.abs(error).max() > 0.3


@pytest.mark.parametrize("probes", [1, 2, 6])
def test_the_error_near_bounds_is_that_of_the_inside(probes):
    at_bounds, _ = mean_gradient(AT_BOUNDS, UNIT, probes=probes)
    expected = WIDTH / probes - 1
    assert relative_error(at_bounds, TRUE) == pytest.approx(expected, rel=0.1, abs=1e-20)
    inside, _ = mean_gradient(INSIDE, {}, probes=probes)
    assert relative_error(inside, TRUE) == pytest.approx(expected, rel=0.1, abs=1e-20)


def test_central_differences_step_away_from_a_bound():
    """Of a quadratic the centred difference is the derivative at the centre: off by the shift, not by half a step."""
    found, box = mean_gradient(
        torch.zeros(8, 1, dtype=torch.float64),
        UNIT,
        lambda x: x * x,
        torch.ones(8, 1, dtype=torch.float64),
        difference="central",
    )
    assert min(box.seen) >= 0
    assert found.flatten().tolist() == pytest.approx([0.2] * 8)


def test_bounds_per_element():
    low, high = [0.0, -5.0, 0.0, 0.0, 0.9, 0.0], [1.0, 5.0, 0.1, 1.0, 1.0, 1.0]
    box = ArrayBox(inside_only(low, high))
    box.domains = {0: Domain(low, high)}
    x = torch.tensor([0.0, 5.0, 0.1, 0.5, 0.95, 1.0], dtype=torch.float64).repeat(64, 1)
    rule = BlackBoxRule(box, probes=WIDTH, step_size=0.3, input_scale=1.0, clip=None)
    (found,) = gradient(rule, x, v=V[:64])  # raises where outputs are NaN
    assert slope(found, TRUE[:64]) == pytest.approx(1.0, abs=1e-9)
    box.domains = {}
    with pytest.raises(RewriteError, match="of the queries"):
        gradient(BlackBoxRule(box, probes=WIDTH, step_size=0.3, input_scale=1.0, max_failed=0.1), x, v=V[:64])


def inside_only(low, high):
    def function(x):
        y = x @ MATRIX
        y[((x < np.array(low)) | (x > np.array(high))).any(1)] = math.nan
        return y

    return function


def test_the_first_backward_measures_its_step_inside_the_bounds():
    box = Watched(lambda x: np.sqrt(x) @ MATRIX, UNIT)
    x = torch.rand(200, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
    (found,) = gradient(BlackBoxRule(box, probes=WIDTH), x, v=V[:200])
    assert min(box.seen) >= 0
    assert relative_error(found, TRUE[:200] / (2 * x.sqrt())) < 1e-4


def test_positive_inputs_are_multiplied():
    """Over ten decades at once, where steps of one size fail."""
    x = torch.logspace(-6, 4, 200, dtype=torch.float64).reshape(200, 1)
    v = torch.ones(200, 1, dtype=torch.float64)
    box = Watched(np.log, {0: Domain(positive=True)})
    (found,) = gradient(BlackBoxRule(box), x, v=v)
    assert torch.allclose(found, 1 / x, rtol=1e-4)
    assert min(box.seen) > 0
    plain = ArrayBox(lambda x: np.log(np.maximum(x, 1e-12)))
    (wrong,) = gradient(BlackBoxRule(plain), x, v=v)
    assert not torch.allclose(wrong, 1 / x, rtol=0.1)


def test_an_input_that_is_not_positive_is_an_error():
    rule = BlackBoxRule(Watched(np.exp, {0: Domain(positive=True)}))
    with pytest.raises(RewriteError, match="declared positive is not") as found:
        gradient(rule, torch.tensor([[1.0], [-2.0]]), v=torch.ones(2, 1))
    assert "-2" in str(found.value)


def test_an_input_outside_its_bounds_is_an_error():
    rule = BlackBoxRule(Watched(np.exp, {0: Domain(high=1.0)}))
    with pytest.raises(RewriteError, match="outside its declared domain") as found:
        gradient(rule, torch.tensor([[1.0, 0.0], [0.5, 1.5]]), v=torch.ones(2, 2))
    assert "element 1 of a row reaches 0 .. 1.5" in str(found.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("domain", [Domain(low=0.7, high=1.1), Domain(low=0.7, high=1.1, positive=True)])
def test_a_bound_that_the_dtype_of_the_input_rounds_is_where_the_input_is(domain, dtype):
    """A box that computes in doubles sees that the nearest float32 and bfloat16 of both bounds lie outside."""
    x = torch.tensor([[0.1, 0.9, 2.0]], dtype=dtype).clamp(0.7, 1.1)
    assert x[0, 0].item() < 0.7 < 1.1 < x[0, 2].item()
    box = Watched(np.square, {0: domain})
    (found,) = gradient(BlackBoxRule(box, probes=3), x, v=torch.ones(1, 3))
    assert torch.allclose(found, 2 * x, rtol=1e-2 if dtype is torch.bfloat16 else 1e-3)
    assert (min(box.seen), max(box.seen)) == pytest.approx((x.min().item(), x.max().item()), rel=1e-12)
    with pytest.raises(RewriteError, match="outside its declared domain"):
        gradient(BlackBoxRule(box, probes=3), x + 0.02, v=torch.ones(1, 3))


@pytest.mark.parametrize("x", [2.0, 2.3, 2.5])
def test_whole_numbers_get_the_gradient_of_the_smoothed_box(x):
    """For normal z, d/dx E[round(x + h z)] = 1 + 2 sum_k exp(-2 (pi h k)^2) cos(2 pi k (x - 1/2)) (Poisson)."""
    box = CallableBox(lambda n: 3.0 * n, domains={0: Domain(integer=True)})
    rule = BlackBoxRule(
        box, step_size=1e-3, input_scale=1.0, clip=None, directions="gaussian", reconstruction="average"
    )
    rows = 100_000
    (found,) = gradient(rule, torch.full((rows, 1), x, dtype=torch.float64), v=torch.ones(rows, 1, dtype=torch.float64))
    expected = 3.0 * (1 + 2 * math.exp(-2 * (math.pi / 2) ** 2) * math.cos(2 * math.pi * (x - 0.5)))
    assert found.mean().item() == pytest.approx(expected, abs=4.5 * found.std().item() / math.sqrt(rows))
    seen = box(torch.tensor([[1.4], [1.6]]))
    assert seen.flatten().tolist() == [3.0, 6.0]


def test_without_the_declaration_a_small_step_sees_nothing():
    rule = BlackBoxRule(CallableBox(lambda n: 3.0 * np.rint(n)), step_size=1e-3, input_scale=1.0, clip=None)
    with pytest.warns(UserWarning, match="no probe changed"):
        (found,) = gradient(rule, torch.full((9, 1), 2.0, dtype=torch.float64), v=torch.ones(9, 1, dtype=torch.float64))
    assert not found.any()


TANK = {0: Domain(low=0.0, high=1.0), 1: Domain(positive=True), 2: Domain(integer=True, low=0, high=9)}


def tank(level, rate, pumps):
    return np.stack((np.sin(level[:, 0]) * pumps[:, 0], np.log(rate[:, 0]) + level[:, 1], 2 * pumps[:, 1]), 1)


def tank_inputs(rows):
    random = torch.Generator().manual_seed(0)
    level, rate = torch.rand(2, rows, 2, generator=random, dtype=torch.float64)
    pumps = torch.randint(0, 10, (rows, 2), generator=random).double()
    pulled = torch.ones(rows, 3, dtype=torch.float64)
    whole = torch.stack((level[:, 0].sin(), torch.full((rows,), 2.0)), 1)
    smooth = torch.stack((level[:, 0].cos() * pumps[:, 0], torch.ones(rows)), 1)
    return (level, rate + 0.1, pumps), pulled, (smooth, torch.stack((1 / (rate[:, 0] + 0.1), 0 * rate[:, 1]), 1), whole)


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("directions", ["orthogonal", "gaussian", "coordinate"])
def test_the_jumps_of_whole_numbers_do_not_leak_into_others(directions, difference):
    """At the step that the smooth inputs get, a probe of all at once would drown their share in that of the jumps."""
    inputs, v, expected = tank_inputs(64)
    rule = BlackBoxRule(CallableBox(tank, domains=TANK), probes=6, directions=directions, difference=difference)
    found = gradient(rule, *inputs, v=v)
    assert rule.describe()["kind"] == "smooth"
    for mine, true in zip(found, expected, strict=True):
        assert torch.allclose(mine, true, atol=1e-3, rtol=1e-3)


def test_beside_whole_numbers_few_probes_are_unbiased_with_the_error_of_coordinates():
    inputs, v, expected = tank_inputs(1)
    inputs, v = tuple(value.expand(4000, -1) for value in inputs), v.expand(4000, -1)
    found = torch.cat(gradient(BlackBoxRule(CallableBox(tank, domains=TANK), probes=2), *inputs, v=v), 1)
    true = torch.cat(expected, 1)
    assert slope(found, true.expand(4000, -1)) == pytest.approx(1.0, abs=0.05)
    assert relative_error(found, true.expand(4000, -1)) == pytest.approx(6 / 2 - 1, rel=0.1)


def test_shared_parameters_keep_their_bounds():
    seen = []

    def decay(t, rate):
        seen.append(rate.copy())
        return np.exp(-rate * t)

    box = CallableBox(decay, shared=[1], domains={1: Domain(low=0.0)})
    t = torch.linspace(0, 1, 16, dtype=torch.float64).reshape(16, 1)
    rate = torch.tensor([1e-3], dtype=torch.float64)
    (found,) = gradient(
        BlackBoxRule(box, step_size=0.1, input_scale=1.0), t, rate, v=torch.ones_like(t), needed=(False, True)
    )[1:]
    assert min(value.min() for value in seen) >= 0
    assert found.item() == pytest.approx(-float(t.sum()), rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 1.0, "high": 0.0}, "no order"),
        ({"low": [0.0, 0.0], "high": [1.0, 1.0, 1.0]}, "no order"),
        ({"low": math.nan}, "no order"),
        ({"low": 0.2, "high": 0.8, "integer": True}, "no order"),
        ({"positive": True, "integer": True}, "both"),
        ({"positive": True, "low": -1.0}, "negative bound"),
        ({"low": "a"}, "no number"),
    ],
)
def test_contradictions_are_refused(arguments, message):
    with pytest.raises(BoxError, match=message):
        Domain(**arguments)


def test_a_domain_of_the_wrong_width_is_refused():
    box = CallableBox(np.sin, domains={0: Domain(low=[0.0, 0.0])})
    with pytest.raises(BoxError, match="2 bounds for 3 elements"):
        gradient(BlackBoxRule(box), torch.rand(4, 3), v=torch.ones(4, 3))


@pytest.mark.parametrize("domains", [{0: (0.0, 1.0)}, {-1: Domain(low=0.0)}, {"x": Domain(low=0.0)}, [Domain(low=0.0)]])
def test_what_does_not_say_which_input_has_which_domain(domains):
    with pytest.raises(BoxError, match="does not say which input"):
        CallableBox(np.sin, domains=domains)


def test_a_domain_of_an_input_that_is_not_there_or_not_floating():
    with pytest.raises(BoxError, match=r"domain for input 1, but it got 1"):
        CallableBox(np.sin, domains={1: Domain(low=0.0)})(torch.rand(4, 3))
    with pytest.raises(BoxError, match=r"domain for input 1, but it is integer"):
        CallableBox(lambda x, n: x * n, domains={1: Domain(low=0.0)})(torch.rand(4, 3), torch.ones(4, 1).long())
