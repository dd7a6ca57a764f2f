"""The bridge inside people's lives: everything a training script does to a module, compared with eager bit for bit.

The rewritten models have two regions that run through the bridge exactly (`Exact`), a parameter that both regions and
the ordinary tape read, a frozen part and dropout. `Wrong`, whose gradients are scaled, is the negative control.
"""

import copy
import functools
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from exact_entry import Exact, Wrong
from torch import nn
from torch.utils.checkpoint import checkpoint

from rewriter import Plan, RewriteError, rewrite


class Block(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.3)
        self.shared = shared

    def forward(self, x):
        return x + self.drop(torch.tanh(self.linear(x)) * self.shared)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.first = nn.Linear(6, 8)
        self.one = Block(self.shared)
        self.middle = nn.Linear(8, 8)
        self.two = Block(self.shared)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 3)
        self.middle.weight.requires_grad_(False)

    def forward(self, x):
        x = self.two(self.middle(self.one(self.first(x)) * self.shared))
        return self.last(self.norm(x))


PLAN = Plan([Exact("one"), Exact("two")])


def pair(plan=PLAN, **options):
    torch.manual_seed(0)
    eager = Net()
    step = rewrite(copy.deepcopy(eager), plan, loss=F.cross_entropy, **options)
    return eager, step


def batch(seed=1, rows=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator), torch.randint(0, 3, (rows,), generator=generator)


def equal(eager, step):
    """Every gradient, buffer and parameter is the same, bit for bit."""
    mine = dict(step.named_parameters())
    assert mine.keys() == dict(eager.named_parameters()).keys()
    for name, parameter in eager.named_parameters():
        assert torch.equal(parameter, mine[name]), name
        if parameter.grad is None:
            assert mine[name].grad is None, name
        else:
            assert torch.equal(parameter.grad, mine[name].grad), name
    theirs = dict(step.named_buffers())
    for name, buffer in eager.named_buffers():
        assert torch.equal(buffer, theirs[name]), name


def run_both(eager, step, go):
    """`go(call)` once with eager and once with the step, `call(x, y)` being the loss, from the same random state."""
    torch.manual_seed(3)
    first = go(lambda x, y: F.cross_entropy(eager(x), y))
    torch.manual_seed(3)
    second = go(lambda x, y: step(x, target=y))
    return first, second


def test_backward_and_accumulation():
    eager, step = pair()

    def go(call):
        for seed in (1, 2, 3):
            (call(*batch(seed)) / 3).backward()

    run_both(eager, step, go)
    equal(eager, step)
    assert step.ledger["one"].vjps == 3
    assert step.ledger["two"].vjps == 3


def test_the_oracle_notices_a_wrong_scale():
    eager, step = pair(Plan([Exact("one"), Wrong("two", factor=0.999)]))
    run_both(eager, step, lambda call: call(*batch()).backward())
    with pytest.raises(AssertionError):
        equal(eager, step)


def test_several_losses_summed_and_scaled():
    eager, step = pair()
    run_both(eager, step, lambda call: (call(*batch(1)) + 3 * call(*batch(2)) ** 2).backward())
    equal(eager, step)


def test_retain_graph_gives_the_same_gradient_twice():
    eager, step = pair()

    def go(call):
        loss = call(*batch())
        loss.backward(retain_graph=True)
        loss.backward()
        return loss

    _, loss = run_both(eager, step, go)
    equal(eager, step)
    with pytest.raises((RewriteError, RuntimeError), match="second time"):
        loss.backward()


def test_autograd_grad_and_inputs():
    eager, step = pair()
    x, y = batch()

    def go(call):
        own = x.clone().requires_grad_()
        return torch.autograd.grad(call(own, y), own)[0]

    first, second = run_both(eager, step, go)
    assert torch.equal(first, second)
    assert all(parameter.grad is None for parameter in step.parameters())


def test_differentiating_twice_is_refused_by_name():
    _, step = pair()
    x, y = batch()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(step(x, target=y), x, create_graph=True)
    with pytest.raises(RewriteError, match=r"differentiated twice[\s\S]*one"):
        gradient.pow(2).sum().backward()


def test_tensor_and_accumulate_hooks_fire_once():
    counts = {}

    def go_on(module, call):
        fired = counts.setdefault(id(module), [0, 0])

        def halve(gradient):
            fired[0] += 1
            return gradient / 2

        def accumulated(parameter):
            fired[1] += 1

        handles = [p.register_hook(halve) for p in module.parameters() if p.requires_grad]
        handles += [p.register_post_accumulate_grad_hook(accumulated) for p in module.parameters() if p.requires_grad]
        call(*batch()).backward()
        for handle in handles:
            handle.remove()

    eager, step = pair()
    torch.manual_seed(3)
    go_on(eager, lambda x, y: F.cross_entropy(eager(x), y))
    torch.manual_seed(3)
    go_on(step, lambda x, y: step(x, target=y))
    equal(eager, step)
    assert counts[id(eager)] == counts[id(step)]


def test_full_backward_hooks_of_submodules_and_of_the_root():
    eager, step = pair(Plan([Exact("two")]))
    seen = {}
    for key, model in (("eager", eager), ("step", step.model)):
        for name in ("one", "norm", ""):
            module = model.get_submodule(name)

            def keep(module, inputs, outputs, key=key, name=name):
                seen[key, name] = outputs[0].clone()

            module.register_full_backward_hook(keep)
            module.register_forward_hook(lambda module, inputs, output: output * 1.5)
    run_both(eager, step, lambda call: call(*batch()).backward())
    equal(eager, step)
    for name in ("one", "norm", ""):
        assert torch.equal(seen["eager", name], seen["step", name]), name


def test_a_hook_added_later_is_noticed():
    eager, step = pair(Plan([Exact("two")]))
    run_both(eager, step, lambda call: call(*batch()).backward())
    for model in (eager, step.model):
        model.one.register_forward_hook(lambda module, inputs, output: output * 2)
    run_both(eager, step, lambda call: call(*batch(2)).backward())
    equal(eager, step)


def test_a_hook_inside_a_region_is_refused():
    _, step = pair()
    step.model.one.linear.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(RewriteError, match="hook"):
        step(*batch()[:1])


def test_gradient_scaler_in_float16():
    eager, step = pair()
    skipped = {}
    for key, model, call in (
        ("eager", eager, lambda x, y: F.cross_entropy(eager(x), y)),
        ("step", step, lambda x, y: step(x, target=y)),
    ):
        torch.manual_seed(3)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
        for factor in (1.0, float("inf"), 1.0):
            with torch.autocast("cpu", torch.float16):
                loss = call(*batch())
            scaler.scale(loss * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        skipped[key] = scaler.get_scale()
    assert skipped["eager"] == skipped["step"] == 8.0
    equal(eager, step)


def test_bf16_autocast():
    eager, step = pair()

    def go(call):
        with torch.autocast("cpu", torch.bfloat16):
            loss = call(*batch())
        loss.backward()  # outside autocast, as the engine runs it

    run_both(eager, step, go)
    equal(eager, step)


@pytest.mark.parametrize("reentrant", [False, True])
def test_outer_checkpoint(reentrant):
    eager, step = pair()

    def go(call):
        x, y = batch()
        x.requires_grad_()
        checkpoint(call, x, y, use_reentrant=reentrant).backward()
        return x.grad

    first, second = run_both(eager, step, go)
    assert torch.equal(first, second)
    equal(eager, step)


def test_compiled_surroundings():
    eager, step = pair()
    before = nn.Linear(6, 6)

    def go(call):
        compiled = torch.compile(lambda x, y: call(torch.relu(before(x)), y) * 2, backend="eager")
        compiled(*batch()).backward()
        found = before.weight.grad.clone()
        before.zero_grad()
        return found

    first, second = run_both(eager, step, go)
    assert torch.equal(first, second)
    equal(eager, step)


def test_functional_call_reads_swapped_parameters():
    eager, step = pair()
    swapped = {name: (p * 1.5).detach().requires_grad_() for name, p in eager.named_parameters()}
    x, y = batch()
    torch.manual_seed(3)
    first = torch.autograd.grad(
        F.cross_entropy(torch.func.functional_call(eager, swapped, (x,)), y), swapped.values(), allow_unused=True
    )
    step(x, target=y)  # captured before the swap
    torch.manual_seed(3)
    second = torch.autograd.grad(
        torch.func.functional_call(step, swapped, (x,), {"target": y}), swapped.values(), allow_unused=True
    )
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


def test_transforms_are_refused_in_words():
    _, step = pair()
    x, y = batch()
    step(x, target=y)
    with pytest.raises(RewriteError, match=r"torch\.func"):
        torch.func.grad(lambda x: step(x, target=y))(x)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies_continue_alike(way):
    eager, step = pair()
    run_both(eager, step, lambda call: call(*batch()).backward())
    if way == "deepcopy":
        other = copy.deepcopy(step)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(step))
    else:
        file = io.BytesIO()
        torch.save(step, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert other.model is not step.model
    assert other.model.shared is other.model.one.shared is other.shared
    other.zero_grad()
    eager.zero_grad()
    run_both(eager, other, lambda call: call(*batch(2)).backward())
    if way != "deepcopy":  # gradients are not pickled with parameters
        assert step.first.weight.grad is not None
    equal(eager, other)


def test_state_dict_has_the_users_names_and_loads_both_ways():
    eager, step = pair()
    own = set(eager.state_dict())
    assert {key for key in step.state_dict() if not key.startswith("rewriter.")} == own
    assert set(step.model.state_dict()) == own
    step.load_state_dict(eager.state_dict())  # strict: a plain checkpoint loads clean
    _, other = pair()
    run_both(eager, other, lambda call: call(*batch()).backward())
    step.load_state_dict(other.state_dict())
    assert step._clock.forward == other._clock.forward == 0
    with pytest.raises(RuntimeError, match="Missing key"):
        step.load_state_dict({})


def test_a_changed_freeze_is_honoured_without_a_new_capture():
    eager, step = pair()
    for model in (eager, step.model):
        model.one.linear.weight.requires_grad_(False)
        model.middle.weight.requires_grad_(True)
    run_both(eager, step, lambda call: call(*batch()).backward())
    equal(eager, step)
    assert step.model.one.linear.weight.grad is None


def test_in_place_change_of_a_region_input_is_noticed():
    outputs = []
    step = rewrite(nn.Sequential(nn.Linear(3, 3), Keep(outputs), nn.Linear(3, 1)), Plan([Exact("1")]))
    loss = step(torch.randn(4, 3)).sum()
    with torch.no_grad():
        outputs[-1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Keep(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, x):
        y = torch.sigmoid(x)
        self.outputs.append(y)
        return y


def test_train_and_eval_reach_the_model():
    eager, step = pair()
    step.eval()
    eager.eval()
    assert not step.model.training
    assert not step.model.one.training
    x, y = batch()
    assert torch.equal(step(x), eager(x))
    assert torch.equal(step(x, target=y), F.cross_entropy(eager(x), y))
    with torch.no_grad():
        step.train()
        assert step.model.training
        torch.manual_seed(0)
        first = step(x)
        eager.train()
        torch.manual_seed(0)
        assert torch.equal(first, eager(x))


def test_partial_losses_and_parameter_groups():
    """Only some parameters get gradients: the rest keeps None, as in eager."""
    eager, step = pair()

    def go(call, model):
        loss = call(*batch())
        loss.backward(inputs=[model.one.linear.weight])

    for model, call in (
        (eager, lambda x, y: F.cross_entropy(eager(x), y)),
        (step.model, lambda x, y: step(x, target=y)),
    ):
        torch.manual_seed(3)
        go(call, model)
    equal(eager, step)


def test_signature_carries_the_target():
    import inspect

    _, step = pair()
    assert list(inspect.signature(step.forward).parameters) == ["x", "target"]
    assert functools.reduce(getattr, ("model", "one"), step) is step.one
    with pytest.raises(AttributeError):
        _ = step.nothing
