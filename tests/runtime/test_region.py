"""The bridge alone: one autograd.Function that returns what a rule returns, at the right time, to the right inputs."""

import pytest
import torch
from torch import nn

from rewriter import RewriteError
from rewriter.runtime.region import Clock, Region, keeps_graph
from rewriter.runtime.rule import Taken


class Product:
    """y = a * b * w summed over parameters w, and a whole-number output; the gradient is what `scale` says of it."""

    def __init__(self, scale=1.0):
        self.scale, self.calls, self.forwards, self.kept = scale, [], [], []

    def forward(self, call, inputs, parameters):
        self.forwards.append((call, inputs, parameters, torch.is_grad_enabled()))
        a, b = inputs[:2]
        total = sum(parameters) if parameters else torch.ones(())
        return Taken((a * b * total, (a > 0).sum(-1)), (a, b), list(parameters))

    def backward(self, call, taken, cotangents, needed):
        self.calls.append((call, cotangents, needed, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        self.kept.append((keeps_graph(), len(taken.outputs)))
        a, b = taken.tensors
        total = sum(taken.memory) if taken.memory else torch.ones(())
        given = cotangents[0] * self.scale
        found = (given * b * total, given * a * total, *((given * a * b).sum() for _ in taken.memory))
        return tuple(value if need else None for value, need in zip(found, needed, strict=True))


def setup(scale=1.0, count=2):
    torch.manual_seed(0)
    rule = Product(scale)
    parameters = [nn.Parameter(torch.tensor(1.0 + i)) for i in range(count)]
    region = Region("part", rule, Clock(5), lambda: tuple(parameters))
    a, b = torch.randn(4, 3).requires_grad_(), torch.randn(4, 3).requires_grad_()
    return rule, region, parameters, a, b


def test_gradients_are_what_the_rule_returns():
    rule, region, parameters, a, b = setup()
    y, count = region(a, b)
    found = torch.autograd.grad(y.sum(), (a, b, *parameters))
    expected = torch.autograd.grad((a * b * sum(parameters)).sum(), (a, b, *parameters))
    assert all(map(torch.allclose, found, expected))
    assert count.dtype == torch.int64
    assert not count.requires_grad
    (call, cotangents, needed, grad, _) = rule.calls[0]
    assert (call.region, needed, grad, len(rule.calls)) == ("part", (True,) * 4, False, 1)
    assert cotangents[1] is None


def test_a_wrong_rule_is_not_corrected():
    _, region, parameters, a, b = setup(scale=0.5)
    (found,) = torch.autograd.grad(region(a, b)[0].sum(), a)
    (right,) = torch.autograd.grad((a * b * sum(parameters)).sum(), a)
    assert torch.allclose(found, right / 2)
    assert not torch.allclose(found, right)


def test_nothing_touches_grad():
    _, region, parameters, a, b = setup()
    torch.autograd.grad(region(a, b)[0].sum(), a)
    assert all(tensor.grad is None for tensor in (a, b, *parameters))


def test_the_rule_sees_detached_aliases_without_a_tape():
    rule, region, parameters, a, b = setup()
    region(a, b)
    _, inputs, trained, taped = rule.forwards[0]
    assert not taped
    assert all(not value.requires_grad for value in (*inputs, *trained))
    assert inputs[0].data_ptr() == a.data_ptr()
    assert trained[0].data_ptr() == parameters[0].data_ptr()


def test_needed_says_whose_gradient_is_asked_for():
    rule, region, parameters, a, b = setup()
    parameters[1].requires_grad_(False)
    region.trainable = lambda: tuple(p for p in parameters if p.requires_grad)
    region(a, b.detach())[0].sum().backward(inputs=[a])
    assert rule.forwards[0][0].needed == (True, False, True)
    assert rule.calls[0][2] == (True, False, True)
    assert a.grad is not None
    assert parameters[0].grad is None


@pytest.mark.parametrize("why", ["no_grad", "nothing differentiable"])
def test_without_gradients_nothing_is_kept(why):
    rule, region, _, a, b = setup(count=0)
    with torch.set_grad_enabled(why != "no_grad"):
        y, _ = region(*((a, b) if why == "no_grad" else (a.detach(), b.detach())))
    assert y.grad_fn is None
    assert rule.forwards[0][0].needed == (False, False)


def test_other_arguments_pass_through():
    class Power(Product):
        def forward(self, call, inputs, parameters):
            self.other = inputs[1]
            return Taken((inputs[0] ** inputs[1],), (inputs[0],), [])

        def backward(self, call, taken, cotangents, needed):
            assert needed == (True, False)
            return cotangents[0] * self.other * taken.tensors[0], None

    a = torch.randn(3).requires_grad_()
    y = Region("power", Power(), Clock(0))(a, 2)
    assert isinstance(y, torch.Tensor)
    assert torch.allclose(torch.autograd.grad(y.sum(), a)[0], 2 * a)


def test_returned_picks_and_orders_outputs():
    _, region, _, a, b = setup()
    region.returned = (1, 0)
    count, y = region(a, b)
    assert count.dtype == torch.int64
    y.sum().backward()
    region.returned = (0,)
    assert torch.equal(region(a, b), y)
    region.returned = (0, 0)
    first, second = region(a, b)
    (found,) = torch.autograd.grad((first + second).sum(), a)
    assert torch.allclose(found, 2 * a.grad)


def test_keys_follow_the_clock():
    rule, region, _, a, b = setup()
    for _ in range(2):
        region.clock.tick()
        region(a, b)
    first, second = (call.key for call, *_ in rule.forwards)
    assert first != second
    other, again, _, a, b = setup()
    again.clock.tick()
    again(a, b)
    assert other.forwards[0][0].key == first
    again.name = "elsewhere"
    again(a, b)
    assert other.forwards[1][0].key != first


def test_retain_graph_and_a_second_backward():
    rule, region, _, a, b = setup()
    loss = region(a, b)[0].sum()
    loss.backward(retain_graph=True)
    first = a.grad.clone()
    a.grad = None
    loss.backward()
    assert torch.equal(a.grad, first)
    assert rule.kept == [(True, 0), (False, 0)]
    with pytest.raises((RewriteError, RuntimeError), match="second time"):
        loss.backward()


def test_a_second_backward_is_refused_by_name_where_torch_keeps_nothing():
    """A rule that saves no tensors: torch itself would let the second backward pass."""

    class Keeps(Product):
        def forward(self, call, inputs, parameters):
            return Taken((inputs[0] * 2,), (), "memory")

        def backward(self, call, taken, cotangents, needed):
            assert taken.memory == "memory"
            return (cotangents[0] * 2,)

    a = torch.randn(3).requires_grad_()
    loss = Region("part", Keeps(), Clock(0))(a).sum()
    torch.autograd.grad(loss, a)
    with pytest.raises(RewriteError, match=r"second time[\s\S]*part[\s\S]*retain_graph=True"):
        torch.autograd.grad(loss, a)


def test_double_backward_is_refused_by_name():
    _, region, _, a, b = setup()
    (gradient,) = torch.autograd.grad(region(a, b)[0].sum(), a, create_graph=True)
    assert gradient.requires_grad
    with pytest.raises(RewriteError, match=r"differentiated twice[\s\S]*part"):
        gradient.sum().backward()


def test_a_gradient_penalty_is_never_silently_zero():
    _, region, _, a, b = setup()
    (gradient,) = torch.autograd.grad(region(a, b)[0].sum(), a, create_graph=True)
    penalty = (gradient.norm() - 1) ** 2
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(penalty, b)
    with pytest.raises(RewriteError, match="differentiated twice"):
        penalty.backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_function_transforms_are_refused(transform):
    _, region, _, a, b = setup()
    calls = {
        "vmap": lambda: torch.vmap(lambda x: region(x, x)[0])(a.detach()),
        "grad": lambda: torch.func.grad(lambda x: region(x, b)[0].sum())(a.detach()),
        "jvp": lambda: torch.func.jvp(lambda x: region(x, b)[0], (a.detach(),), (a.detach(),)),
    }
    with pytest.raises(RewriteError, match=r"torch\.func transform[\s\S]*part"):
        calls[transform]()


def test_backward_runs_under_the_autocast_of_forward():
    rule, region, _, a, b = setup()
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = region(a, b)
    y.sum().backward()
    z, _ = region(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        z.sum().backward()
    assert [autocast for *_, autocast in rule.calls] == [True, False]


def test_an_error_in_a_rule_is_passed_on_and_leaves_the_state():
    class Fails(Product):
        def backward(self, call, taken, cotangents, needed):
            raise ValueError("it failed")

    a = torch.randn(3).requires_grad_()
    region = Region("part", Fails(), Clock(0))
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = region(a, a)
    with pytest.raises(ValueError, match="it failed"):
        y.sum().backward()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()


def test_an_input_changed_in_place_is_noticed():
    _, region, _, a, b = setup()
    inner = a * 1
    y, _ = region(inner, b)
    with torch.no_grad():
        inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
