"""`UlrCut` as a pass: the graph it makes, and what it refuses with which remedy."""

import cuts
import pytest
import torch
import torch.nn.functional as F
from cuts import Net, X, Y
from torch import nn

from rewriter import Plan, RewriteError, UlrCut

TEXT = """\
x = placeholder() : float64[12, 6] rows dim 0
encoder_0 = call_module encoder.0(x) : float64[12, 5] rows dim 0
encoder_1 = call_module encoder.1(encoder_0) : float64[12, 5] rows dim 0
detach = call_method detach(encoder_1) : float64[12, 5] rows dim 0
ones_like = call_function ones_like(detach) : float64[12, 5] rows dim 0
tail_2 = call_module tail.0(ones_like) : float64[12, 5] rows dim 0
mul = call_function mul(detach, tail_2) : float64[12, 5] rows dim 0
tail_1 = call_module tail.1(mul) : float64[12, 4] rows dim 0
anchor = call_function anchor(encoder_1, tail_2, tail_1) : float64[]
output = output(tail_1)
region encoder: UlrCut('encoder', copies=4) owns anchor
segment exact_0 [exact]: encoder_0, encoder_1, detach, ones_like, tail_2, mul, tail_1
segment encoder [encoder]: anchor"""


def program(net, entry, x=X):
    return cuts.cut(net, entry, x).latest.program


def test_the_graph_is_cut_and_dropout_becomes_a_product_with_its_mask():
    net = Net(nn.Sequential(nn.Dropout(0.3), nn.Linear(5, 4)))
    assert str(program(net, UlrCut("encoder", copies=4))) == TEXT


def test_a_dropout_that_does_nothing_stays():
    for dropout in (nn.Dropout(0.0), nn.Dropout(0.3).eval()):
        net = Net(nn.Sequential(dropout, nn.Linear(5, 4)))
        assert "ones_like" not in str(program(net, UlrCut("encoder")))


def test_writes_in_place_do_not_reach_what_is_kept():
    net = Net(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 4)), nn.Linear(6, 5))
    assert "clone(detach)" in str(program(net, UlrCut("encoder")))
    _, expected = cuts.gradients(net, X, Y)
    step = cuts.cut(net, UlrCut("encoder", copies=2))
    _, found = cuts.exactly(step, X, Y)
    assert cuts.error(found, expected) < 1e-12
    cuts.gradients(step, X, Y)


def test_entries_print_and_parse():
    plan = Plan([UlrCut("encoder:out", copies=6, sigma=(0.1, 0.2), directions="laplace", antithetic=True)])
    assert Plan.parse(plan.text()) == plan
    assert str(UlrCut("encoder")) == "UlrCut('encoder')"


@pytest.mark.parametrize(
    "options",
    [
        {"copies": 1},
        {"copies": 2.0},
        {"copies": 5, "antithetic": True},
        {"sigma": 0},
        {"sigma": "small"},
        {"sigma": (0.1, -1.0)},
        {"directions": "rademacher"},
        {"baseline": "mean"},
        {"baseline": "leave-one-out", "directions": "sobol"},
        {"directions": "sobol", "allocation": "norm"},
        {"allocation": "loss"},
        {"max_rows": 0},
        {"max_failed": 2},
    ],
    ids=str,
)
def test_options_are_checked(options):
    with pytest.raises(RewriteError):
        UlrCut("encoder", **options)


class Functional(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.head = function, nn.Linear(5, 4)

    def forward(self, z):
        return self.head(self.function(z))


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 4)
        self.head.register_forward_hook(lambda *_: None)

    def forward(self, z):
        return self.head(z)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.MultiheadAttention(5, 1, dropout=0.2, batch_first=True)
        self.head = nn.Linear(5, 4)

    def forward(self, z):
        z = z[:, None]
        return self.head(self.layer(z, z, z)[0][:, 0])


REFUSED = {
    "batch norm": (nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4)), r"couples rows through the statistics"),
    "functional batch norm": (
        Functional(lambda z: F.batch_norm(z, None, None, training=True)),
        r"batch_norm couples rows",
    ),
    "alpha dropout": (nn.Sequential(nn.AlphaDropout(0.2), nn.Linear(5, 4)), r"cannot be replayed"),
    "noise": (Functional(lambda z: z + torch.randn_like(z)), r"draws random numbers|not captured|cannot be"),
    "opaque dropout": (Attention(), r"cannot be replayed"),
    "hooks": (Hooked(), r"hooks, which would see every copy"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_evaluated_on_copies_is_refused(case):
    tail, message = REFUSED[case]
    with pytest.raises(RewriteError, match=message) as raised:
        cuts.cut(Net(tail), UlrCut("encoder"))
    assert raised.value.remedy


def test_batch_norm_in_eval_is_fine():
    net = Net(nn.Sequential(nn.BatchNorm1d(5).eval(), nn.Linear(5, 4)))
    _, expected = cuts.gradients(net, X, Y)
    _, found = cuts.exactly(cuts.cut(net, UlrCut("encoder", copies=2)), X, Y)
    assert cuts.error(found, expected) < 1e-12


class Stepped(nn.Module):
    """Something trained, and then a step."""

    def __init__(self, step):
        super().__init__()
        self.adapter, self.step = nn.Linear(5, 4), step

    def forward(self, z):
        return self.step(self.adapter(z))


@pytest.mark.parametrize(
    "step", [torch.sign, torch.round, lambda a: (a > 0).double(), lambda a: F.one_hot(a.argmax(1), 4).double()]
)
def test_a_parameter_whose_only_way_has_no_derivative_is_refused(step):
    with pytest.raises(RewriteError, match=r"tail.adapter.(weight|bias) lies behind a cut"):
        cuts.cut(Net(Stepped(step)), UlrCut("encoder"))
    net = Net(Stepped(step))
    net.tail.adapter.requires_grad_(False)
    cuts.cut(net, UlrCut("encoder", copies=2))
    net = Net(Stepped(step))
    cuts.cut(net, Plan([UlrCut("encoder", copies=2), UlrCut("tail.adapter", copies=2)]))  # a cut of its own


def test_where_there_is_nothing_to_cut():
    net = Net()
    net.encoder.requires_grad_(False)
    with pytest.raises(RewriteError, match="nothing before the cut is trained"):
        cuts.cut(net, UlrCut("encoder"))
    with pytest.raises(RewriteError, match="names nothing"):
        cuts.cut(Net(), UlrCut("encode"))

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6, 5))

        def forward(self):
            return self.weight * 2

    class Hyper(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights, self.head = Bare(), nn.Linear(5, 4)

        def forward(self, x):
            return self.head(x @ self.weights())

    with pytest.raises(RewriteError, match="no row index"):
        cuts.cut(Hyper().double(), UlrCut("weights"))


def test_sobol_sets_need_many_copies():
    step = cuts.cut(Net(), UlrCut("encoder", copies=16, directions="sobol"))
    with pytest.raises(RewriteError, match="Sobol"):
        step(X, target=Y).backward()
    step = cuts.cut(Net(), UlrCut("encoder", copies=128, sigma=0.01, directions="sobol"))
    step(X, target=Y).backward()
    assert step.model.encoder[0].weight.grad.any()


def test_one_sigma_for_each_element():
    step = cuts.cut(Net(), UlrCut("encoder", copies=8, sigma=(0.1, 0.2, 0.3, 0.1, 0.1)))
    step(X, target=Y).backward()
    step = cuts.cut(Net(), UlrCut("encoder", copies=8, sigma=(0.1, 0.2)))
    with pytest.raises(RewriteError, match="2 numbers for 5 elements"):
        step(X, target=Y).backward()
