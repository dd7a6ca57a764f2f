"""What a graph took for granted is noticed when it changes, by name."""

import pytest
import torch
from nets import Transformer
from oracle import compare
from torch import nn

from rewriter import rewrite
from rewriter.capture import capture


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop, self.norm = nn.Linear(4, 4), nn.Dropout(0.2), nn.BatchNorm1d(4)
        self.rate, self.mode, self.extra = 0.5, "soft", None

    def forward(self, x):
        x = self.norm(self.drop(self.linear(x)))
        if self.training and self.rate > 0:
            x = x * self.rate
        return x if self.extra is None else x + 1


class Traced(nn.Module):
    front_end = "fx"

    def __init__(self):
        super().__init__()
        self.part = Part()

    def forward(self, x):
        return self.part(x) * 2


class Exported(Traced):
    front_end = "export"

    def forward(self, x):
        return super().forward(x) + sum(list(x.unbind(1))).sum()


X = torch.randn(6, 4)
CHANGES = {
    "flag": (lambda m: setattr(m.part, "mode", "hard"), "`mode` of `part` is 'hard' and was 'soft'"),
    "rate": (lambda m: setattr(m.part, "rate", 0.25), "`rate` of `part`"),
    "none": (lambda m: setattr(m.part, "extra", 1), "`extra` of `part`"),
    "gone": (lambda m: delattr(m.part, "rate"), "`rate` of `part`"),
    "part in eval": (lambda m: m.part.eval(), "`training` of `part"),
    "all in eval": (lambda m: m.eval(), "`training` of the model"),
    "child": (lambda m: setattr(m.part, "linear", nn.Linear(4, 4)), "the child `linear` of `part`"),
    "new child": (lambda m: m.part.add_module("late", nn.ReLU()), "the child `late` of `part`"),
    "hook": (lambda m: m.part.register_forward_hook(lambda *a: None), "`part` has a hook now"),
    "pre-hook": (lambda m: m.part.register_forward_pre_hook(lambda *a: None), "`part` has a hook now"),
    "backward hook": (lambda m: m.part.register_full_backward_hook(lambda *a: None), "`part` has a hook now"),
    "dtype": (lambda m: m.double(), "torch.float64"),
}
LIVE = {  # in torch's own modules: read live by fx, baked by torch.export
    "probability": (lambda m: setattr(m.part.drop, "p", 0.9), "`p` of `part.drop` is 0.9 and was 0.2"),
    "frozen statistics": (lambda m: m.part.norm.eval(), "`training` of `part.norm`"),
    "momentum": (lambda m: setattr(m.part.norm, "momentum", 0.5), "`momentum` of `part.norm`"),
}
HARMLESS = {
    "step": lambda m: m.part.linear.weight.data.mul_(2),
    "frozen": lambda m: m.part.linear.requires_grad_(False),
    "buffer": lambda m: m.part.norm.running_mean.add_(1),
    "root hook": lambda m: m.register_forward_hook(lambda *a: None),
}


@pytest.mark.parametrize("kind", [Traced, Exported])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_named(kind, change):
    model = kind()
    captured = capture(model, (X,), {}, prove=False)
    assert captured.front_end == kind.front_end
    assert captured.guards.reason(model, [X]) is None
    action, expected = CHANGES[change]
    action(model)
    assert expected in captured.guards.reason(model, [X])


@pytest.mark.parametrize("change", LIVE)
def test_flags_of_torchs_own_modules(change):
    action, expected = LIVE[change]
    for kind in (Traced, Exported):
        model = kind()
        captured = capture(model, (X,), {}, prove=False)
        action(model)
        reason = captured.guards.reason(model, [X])
        if kind is Traced:
            assert reason is None
        else:
            assert expected in reason


@pytest.mark.parametrize("kind", [Traced, Exported])
@pytest.mark.parametrize("change", HARMLESS)
def test_what_the_graph_reads_live_may_change(kind, change):
    model = kind()
    captured = capture(model, (X,), {}, prove=False)
    HARMLESS[change](model)
    assert captured.guards.reason(model, [X]) is None


def test_sizes_that_export_fixed_are_checked():
    captured = capture(Exported(), (X,), {})
    guards, model = captured.guards, Exported()
    assert guards.conditions
    assert guards.reason(model, [torch.randn(60, 4)]) is None
    assert "s[0][1] == 4" in guards.reason(model, [torch.randn(6, 5)])
    assert "s[0][0] >= 2" in guards.reason(model, [torch.randn(1, 4)])


def test_all_sizes_stay_open_on_request():
    class Sums(nn.Module):
        def forward(self, x):
            return torch.stack([row for row in (2 * x).unbind(-1) if row is not None], 1).cumsum(1)

    model, x = Sums(), torch.randn(5, 6, 3)
    rows, everything = (capture(model, (x,), {}, sizes=sizes) for sizes in ("rows", "all"))
    assert rows.front_end == everything.front_end == "export"
    longer = torch.randn(7, 9, 3)
    assert "s[0][1] == 6" in rows.guards.reason(model, [longer])
    assert everything.guards.reason(model, [longer]) is None
    assert compare(model, everything, (longer,), {}) is None


def test_related_sizes_are_checked():
    class Adds(nn.Module):
        def forward(self, x, y):
            return torch.stack(list((x + y).unbind(1)))

    model = Adds()
    captured = capture(model, (torch.randn(5, 3), torch.randn(5, 3)), {})
    assert captured.front_end == "export"
    assert captured.guards.reason(model, [torch.randn(8, 3), torch.randn(8, 3)]) is None
    assert "s[1][0] == s[0][0]" in captured.guards.reason(model, [torch.randn(8, 3), torch.randn(4, 3)])


def test_only_what_is_inlined_is_watched_by_fx():
    model = Transformer()
    guards = capture(model, (torch.randint(0, 20, (3, 8)),), {}).guards
    assert set(guards.names) == {"", *(f"blocks.{i}{part}" for i in range(2) for part in ("", ".attn", ".mlp"))}


def test_a_hook_on_a_dropped_identity_is_noticed_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Identity(), nn.Linear(3, 2))
    step = rewrite(model, example=(torch.randn(4, 3),))
    seen = []
    handle = model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    step(torch.randn(4, 3))
    captured = step.latest
    seen.clear()
    step(torch.randn(4, 3))
    assert seen == [(4, 3)]
    assert step.latest is captured
    handle.remove()
