"""`UlrCut("**")`: every layer's gradient from an estimate behind it and its own vjp, or from noise in its weights."""

import cuts
import pytest
import torch
import torch.nn.functional as F
from cuts import SEQUENCES, Around, Folded, Loop, Net, X, Y
from torch import nn

from rewriter import Plan, RewriteError, UlrCut, rewrite
from rewriter.runtime.row_weights import RowWeights

GENERATOR = torch.Generator().manual_seed(3)
IMAGES = torch.randn(12, 2, 9, 9, generator=GENERATOR, dtype=torch.float64)
GRAPHS = torch.rand(12, 7, 7, generator=GENERATOR, dtype=torch.float64).softmax(2)


class Residual(nn.Module):
    """Two branches from the input, a residual path, an activation in place, pooling; head is the last layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.side = nn.Conv2d(2, 4, 1)
        self.first, self.inner = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(4).eval(), nn.Linear(16, 4)
        self.double()

    def forward(self, x):
        around = self.side(x)
        h = F.relu(self.first(x))
        h = h + self.norm(self.inner(h))
        h = F.relu(h + around, inplace=True)
        return self.head(F.max_pool2d(h, 4).flatten(1))


class Convolution(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, **options)
        self.head = nn.Linear(4, 4)
        self.double()

    def forward(self, x):
        return self.head(torch.tanh(self.conv(x)).mean((2, 3)))


class Sequence(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.rnn = kind(6, 5, batch_first=True)
        self.head = nn.Linear(10, 4)
        self.double()

    def forward(self, x):
        out, last = self.rnn(x)
        last = last[0] if isinstance(self.rnn, nn.LSTM) else last
        return self.head(torch.cat((out.mean(1), last[-1]), 1))


class GraphLayer(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, adjacency, x):
        return adjacency @ (x @ self.weight)


class GraphNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = GraphLayer(6, 5), GraphLayer(5, 5)
        self.head = nn.Linear(5, 4)
        self.double()

    def forward(self, x, adjacency):
        h = torch.tanh(self.first(adjacency, x))
        return self.head((h + self.second(adjacency, h)).mean(1))


class OneGraph(GraphNet):
    """The same neighbours in every row: an adjacency without rows."""

    def __init__(self):
        super().__init__()
        self.register_buffer("adjacency", GRAPHS[0])

    def forward(self, x):
        return super().forward(x, self.adjacency)


class Owner(nn.Module):
    """Owns a parameter beside modules that do, one of which nobody calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.inner = nn.Parameter(torch.ones(5) / 2), nn.Linear(6, 5)
        self.idle = nn.Linear(3, 3)

    def forward(self, x):
        return torch.tanh(self.inner(x) * self.scale)


class Tied(nn.Module):
    """Two layers with one matrix: it gets the sum."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.second.weight = self.first.weight
        self.double()

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class HandMade(nn.Module):
    """A cell without torch's recurrent operations."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.read, self.keep = nn.Linear(inputs, outputs), nn.Linear(outputs, outputs, bias=False)

    def forward(self, x, h):
        return torch.tanh(self.read(x) + self.keep(h))


def attention():
    """Parts of a module that stays one call are cut with it."""

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attend = nn.Linear(6, 5), nn.MultiheadAttention(5, 1, batch_first=True)

        def forward(self, x):
            h = self.embed(x)
            return h + self.attend(h, h, h, need_weights=False)[0]

    class Positions(Net):
        def forward(self, x):
            return self.tail(self.encoder(x).mean(1))

    return Positions(encoder=Attending())


def frozen(net, part):
    net.get_submodule(part).requires_grad_(False)
    return net


def eager(net, x):
    """Gradients by name, without parameters that nothing reads."""
    given = x if isinstance(x, tuple) else (x,)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(F.cross_entropy(net(*given), Y), list(trained.values()), allow_unused=True)
    return {name: g for name, g in zip(trained, found, strict=True) if g is not None}


def rewritten(net, x, **options):
    given = x if isinstance(x, tuple) else (x,)
    return rewrite(net, UlrCut("**", **options), loss=F.cross_entropy, example=given)


def with_truth(step, x):
    """Gradients where each cut gets the true gradient of what is perturbed there."""
    given = x if isinstance(x, tuple) else (x,)
    torch.manual_seed(1)
    with cuts.standing_in(step, step.latest, lambda _, rule: cuts.Truth(rule)):
        loss = step(*given, target=Y)
        names, parameters = zip(*((n, p) for n, p in step.named_parameters() if p.requires_grad), strict=True)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name.removeprefix("model."): g for name, g in zip(names, found, strict=True)}


def cuts_in(step):
    (region,) = step.latest.program.regions
    return {cut.name: "weight" if cut.layer else "activation" for cut in region.parts}


NETS = {
    "mlp": (Net, X, ["encoder.0", "tail.0", "tail.2"]),
    "mlp, frozen": (lambda: frozen(Net(), "tail.0"), X, ["encoder.0", "tail.2"]),
    "around": (Around, X, ["skip", "encoder.0", "tail.0", "tail.2"]),
    "folded rows": (Folded, SEQUENCES, ["encoder.0", "tail.0", "tail.2"]),
    "residual": (Residual, IMAGES, ["side", "first", "inner", "norm", "head"]),
    "stride": (lambda: Convolution(kernel_size=3, stride=2, padding=1), IMAGES, ["conv", "head"]),
    "kernel 1": (lambda: Convolution(kernel_size=1), IMAGES, ["conv", "head"]),
    "kernel 7, stride 2": (lambda: Convolution(kernel_size=7, stride=2, padding=3), IMAGES, ["conv", "head"]),
    "groups": (lambda: Convolution(kernel_size=3, groups=2, bias=False), IMAGES, ["conv", "head"]),
    "dilation": (lambda: Convolution(kernel_size=3, dilation=2, stride=2), IMAGES, ["conv", "head"]),
    "graphs": (GraphNet, (SEQUENCES, GRAPHS), ["first", "second", "head"]),
    "one graph": (OneGraph, SEQUENCES, ["first", "second", "head"]),
    "tied": (Tied, X, ["first", "second", "head"]),
    "owner": (lambda: Net(encoder=Owner()), X, ["encoder.inner", "encoder", "tail.0", "tail.2"]),
    "cell": (
        lambda: Loop(HandMade),
        SEQUENCES[:, :7],
        [*(f"cell.{part}{at}" for at in ("", *(f"@{k}" for k in range(1, 7))) for part in ("read", "keep")), "head"],
    ),
}
ACTIVATION = {
    **NETS,
    "rnn cell": (lambda: Loop(nn.RNNCell), SEQUENCES, ["cell", *(f"cell@{k}" for k in range(1, 7)), "head"]),
    "gru cell": (lambda: Loop(nn.GRUCell), SEQUENCES, ["cell", *(f"cell@{k}" for k in range(1, 7)), "head"]),
    "lstm cell": (lambda: Loop(nn.LSTMCell), SEQUENCES, ["cell", *(f"cell@{k}" for k in range(1, 7)), "head"]),
    "rnn": (lambda: Sequence(nn.RNN), SEQUENCES, ["rnn", "head"]),
    "gru": (lambda: Sequence(nn.GRU), SEQUENCES, ["rnn", "head"]),
    "lstm": (lambda: Sequence(nn.LSTM), SEQUENCES, ["rnn", "head"]),
    "attention": (attention, SEQUENCES, ["encoder.embed", "encoder.attend", "tail.0", "tail.2"]),
}


def agree(step, net, x):
    """With the truth at every cut; what nothing reads gets no gradient."""
    expected, found = eager(net, x), with_truth(step, x)
    assert all(found.pop(name) is None for name in list(found) if name not in expected)
    return cuts.error(found, expected) < 1e-12


@pytest.mark.parametrize("case", ACTIVATION)
def test_with_true_gradients_behind_every_layer_all_are_exact(case):
    make, x, names = ACTIVATION[case]
    net = make()
    step = rewritten(net, x, copies=2)
    assert cuts_in(step) == dict.fromkeys(names, "activation")
    assert agree(step, net, x)
    given = x if isinstance(x, tuple) else (x,)
    step(*given, target=Y).backward()  # the estimates see every layer
    assert all(p.grad is not None and p.grad.any() for n, p in net.named_parameters() if n in eager(net, x))


@pytest.mark.parametrize("case", NETS)
def test_with_true_gradients_of_every_rows_weights_all_are_exact(case):
    make, x, names = NETS[case]
    net = make()
    if case == "owner":  # its own parameter is read behind the cut in it, and what it does holds that cut
        with pytest.raises(RewriteError, match="another cut lies within"):
            rewritten(net, x, copies=2, noise="weight")
        return
    step = rewritten(net, x, copies=2, noise="weight")
    assert cuts_in(step) == dict.fromkeys(names, "weight")
    assert agree(step, net, x)
    given = x if isinstance(x, tuple) else (x,)
    step(*given, target=Y).backward()
    for name, p in net.named_parameters():
        assert p.grad is None if name not in eager(net, x) else p.grad.any()


def test_weights_of_other_rows_are_seen(monkeypatch):
    """Negative control of the exact path, and of the proof on the first batches."""
    run = RowWeights.run
    net = Net()
    step = rewritten(net, X, copies=2, noise="weight", sigma=0.1)
    monkeypatch.setattr(
        RowWeights, "run", lambda self, inputs, weights: run(self, inputs, [w.roll(1, 0) for w in weights])
    )
    with pytest.raises(RewriteError, match="couples the rows"):
        step(X, target=Y).backward()
    doubled = rewritten(net, X, copies=2, noise="weight")
    monkeypatch.setattr(RowWeights, "run", lambda self, inputs, weights: run(self, inputs, [1.01 * w for w in weights]))
    assert not agree(doubled, net, X)
    with pytest.raises(RewriteError, match="copies of rows"):
        doubled(X, target=Y).backward()


def test_pieces_of_recurrent_modules_are_layers_calls():
    for kind in (nn.RNN, nn.GRU, nn.LSTM):
        net = Sequence(kind)
        step = rewritten(net, SEQUENCES, copies=2, every=3)
        assert list(cuts_in(step)) == ["rnn", "rnn@1", "rnn@2", "head"]
        assert agree(step, net, SEQUENCES)


def test_blocks_by_a_pattern_are_cut_as_blocks():
    net = Net(nn.Sequential(nn.Sequential(nn.Linear(5, 5), nn.Tanh()), nn.ReLU(), nn.Sequential(nn.Linear(5, 4))))
    step = cuts.cut(net, UlrCut("tail.*", copies=2))
    assert list(cuts_in(step)) == ["tail.0", "tail.2"]
    assert agree(step, net, X)
    chosen = cuts.cut(net, UlrCut(lambda module, _: isinstance(module, nn.Linear), copies=2))
    assert list(cuts_in(chosen)) == ["encoder.0", "tail.0.0", "tail.2.0"]
    assert agree(chosen, net, X)
    every = cuts.cut(net, UlrCut(lambda *_: True, copies=2))  # behind containers nothing is left to cut
    assert cuts_in(every) == cuts_in(chosen)
    blocks = cuts.cut(net, UlrCut(lambda module, _: isinstance(module, nn.Sequential), copies=2))
    assert list(cuts_in(blocks)) == ["encoder", "tail.0", "tail.2"]
    assert agree(blocks, net, X)


def test_chunks_and_a_second_backward_change_no_number():
    found = []
    for max_rows in (None, 7):
        step = rewritten(Residual(), IMAGES, copies=4, noise="auto", max_rows=max_rows)
        torch.manual_seed(1)
        loss, parameters = step(IMAGES, target=Y), list(step.parameters())
        found += [torch.autograd.grad(loss, parameters, retain_graph=True), torch.autograd.grad(loss, parameters)]
    assert all(map(torch.equal, found[0], found[1]))
    for a, b in zip(found[0], found[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("noise", ["activation", "weight"])
def test_an_exported_graph_is_cut_alike(noise, monkeypatch):
    monkeypatch.setattr("rewriter.capture._Attempt._trace", lambda _: None)
    for net, x in ((Residual(), IMAGES), (OneGraph(), SEQUENCES)):
        step = rewritten(net, x, copies=2, noise=noise)
        assert step.latest.captured.front_end == "export"
        assert set(cuts_in(step).values()) == {noise}
        assert agree(step, net, x)


def test_several_entries():
    net = Residual()
    for targets in (["s*", "f*", "inner"], ["head", "inner", "f*", "s*"], ["norm", "i*"]):
        step = cuts.cut(net, Plan([UlrCut(target, copies=2) for target in targets]), IMAGES)
        assert agree(step, net, IMAGES)
        step(IMAGES, target=Y).backward()


def test_all_cuts_share_one_evaluation():
    step = rewritten(Net(), X, copies=6)
    for _ in range(2):
        step(X, target=Y).backward()  # proofs, and the first measurement
    before = step.ledger["**"].calls
    step(X, target=Y).backward()
    assert step.ledger["**"].calls == before + 1
    assert step.ledger["**"].probes == 3 * 3 * 6 * len(X)


def test_auto_takes_the_smaller_number():
    step = rewritten(Residual(), IMAGES, noise="auto")
    # 12 parameters before 4 x 81 numbers, 76 before as many, 148 likewise; the head has 68 before 4
    assert cuts_in(step) == {
        "side": "weight",
        "first": "weight",
        "inner": "weight",
        "norm": "weight",
        "head": "activation",
    }
    assert agree(step, Residual(), IMAGES)
    step(IMAGES, target=Y).backward()
    text = step.explain()
    assert "inner: weight noise, width 148" in text
    assert "head: activation noise, width 4" in text
    assert "no parameter sees the loss on the ordinary tape" in text
    # where something before it needs its gradient, or a layer cannot be vectorised, the activation is what is left
    alone = cuts.cut(Residual(), UlrCut("inner", noise="auto"), IMAGES)
    assert cuts_in(alone) == {"inner": "activation"}
    long = SEQUENCES.repeat(1, 3, 1)  # 65 parameters, 110 numbers a row
    assert cuts_in(rewritten(Sequence(nn.RNN), long, noise="auto"))["rnn"] == "activation"


def test_where_weights_cannot_be_perturbed():
    for net, target, x, message in (
        (Net(), "tail", X, "something before it is trained"),
        (Sequence(nn.GRU), "**", SEQUENCES, "recurrent operations"),
        (Loop(nn.GRUCell), "**", SEQUENCES, "recurrent operations"),
        (Net(nn.Linear(5, 4), nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5))), "encoder", X, "draws a dropout"),
    ):
        with pytest.raises(RewriteError, match=message) as raised:
            cuts.cut(net, UlrCut(target, noise="weight"), x)
        assert raised.value.remedy == 'noise="activation"'
    with pytest.raises(RewriteError, match="noise='weights'"):
        UlrCut("**", noise="weights")
    step = rewritten(Net(), X, noise="weight")
    with pytest.raises(RewriteError, match="needs a gradient"):
        step(X.clone().requires_grad_(), target=Y)


def test_what_a_pattern_cannot_cut():
    net = Net()
    net.requires_grad_(False)
    with pytest.raises(RewriteError, match="no module with a trained parameter"):
        rewritten(net, X)
    net = Net(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4)))
    with pytest.raises(RewriteError, match="statistics of the batch"):
        rewritten(net, X)

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.offset = nn.Parameter(torch.randn(5))

        def forward(self):
            return 2 * self.offset

    class Placed(Net):
        def __init__(self):
            super().__init__()
            self.positions = Positions().double()

        def forward(self, x):
            return self.tail(self.encoder(x) + self.positions())

    net = Placed()
    step = rewritten(net, X, copies=2)
    assert list(cuts_in(step)) == ["encoder.0", "tail.0", "tail.2"]
    assert agree(step, net, X)
    assert "positions returns nothing with rows: its gradient comes from the next cut" in step.explain()
    assert str(UlrCut("**", noise="auto")) == "UlrCut('**', noise='auto')"
    assert Plan.parse("UlrCut('**', noise='auto', every=3)") == Plan([UlrCut("**", noise="auto", every=3)])
