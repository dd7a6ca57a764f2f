"""`UlrCut(every=...)`: sub-chains of loops, of lists of blocks and of torch's recurrent modules."""

import cuts
import pytest
import torch
import torch.nn.functional as F
from cuts import SEQUENCES, Loop, X, Y
from torch import nn

from rewriter import RewriteError, UlrCut, rewrite
from rewriter.runtime.sub_chains import SubChainsRule


class Recurrent(nn.Module):
    """One call over the sequence; every step's result is read, and the last state."""

    def __init__(self, kind, batch_first=True, start=False, layers=1):
        super().__init__()
        torch.manual_seed(0)
        self.rnn = kind(6, 5, batch_first=batch_first, num_layers=layers)
        self.start = nn.Parameter(torch.randn(layers, 1, 5)) if start else None
        self.head = nn.Linear(10, 4)
        self.double()

    def forward(self, x):
        if not self.rnn.batch_first:
            x = x.transpose(0, 1)
        state = None
        if self.start is not None:
            rows = x.shape[0] if self.rnn.batch_first else x.shape[1]
            state = self.start.expand(self.start.shape[0], rows, 5).contiguous()
            state = (state, state) if isinstance(self.rnn, nn.LSTM) else state
        if isinstance(self.rnn, nn.LSTM):
            out, (last, _) = self.rnn(x, state)
        else:
            out, last = self.rnn(x, state)
        mean = out.mean(1 if self.rnn.batch_first else 0)
        return self.head(torch.cat((mean, last[-1]), 1))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.start = nn.Linear(6, 5)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(5))
        self.head = nn.Linear(5, 4)
        self.double()

    def forward(self, x):
        value = self.start(x)
        for block in self.blocks:
            value = value + block(value)
        return self.head(value)


class EveryStep(Loop):
    """A loss at every step: what is read beside the chain stays exact."""

    def forward(self, x):
        h = x.new_zeros(x.shape[0], 5)
        outputs = []
        for t in range(7):
            h = self.cell(x[:, t], h)
            outputs.append(self.head(h))
        return torch.stack(outputs, 1)


CHAINS = {
    "rnn cell": (lambda: Loop(nn.RNNCell), "cell", 2, SEQUENCES),
    "gru cell": (lambda: Loop(nn.GRUCell), "cell", 3, SEQUENCES),
    "lstm cell": (lambda: Loop(nn.LSTMCell), "cell", 1, SEQUENCES),
    "blocks": (Blocks, "blocks", 2, X),
    "rnn": (lambda: Recurrent(nn.RNN), "rnn", 3, SEQUENCES),
    "gru": (lambda: Recurrent(nn.GRU, start=True), "rnn", 2, SEQUENCES),
    "gru, time first, two layers": (lambda: Recurrent(nn.GRU, False, True, 2), "rnn", 3, SEQUENCES),
    "lstm": (lambda: Recurrent(nn.LSTM), "rnn", 2, SEQUENCES),
    "lstm with a state": (lambda: Recurrent(nn.LSTM, False, True), "rnn", 4, SEQUENCES),
}


@pytest.mark.parametrize("case", CHAINS)
def test_with_true_gradients_at_the_cuts_sub_chains_add_up(case):
    make, target, every, x = CHAINS[case]
    net = make()
    loss, expected = cuts.gradients(net, x, Y)
    step = cuts.cut(net, UlrCut(target, copies=2, every=every), x)
    length = 5 if case == "blocks" else 7
    cut, apart = step.latest.emitted.regions.values()
    if isinstance(cut.rule, SubChainsRule):
        cut, apart = apart, cut
    assert len(cut.rule.cuts) == -(-length // every) - 1
    assert apart.rule.describe()["sub_chains"] == -(-length // every)
    assert cut.rule.facts.kind == "trainable"
    found_loss, found = cuts.exactly(step, x, Y)
    torch.testing.assert_close(found_loss, loss, rtol=1e-14, atol=0)
    assert cuts.error(found, expected) < 1e-12
    _, estimated = cuts.gradients(step, x, Y)
    chain = [name for name in expected if name.startswith(("cell", "rnn", "blocks.0"))]
    for name in chain:
        assert estimated[name].any()
        assert cuts.error({name: estimated[name]}, {name: expected[name]}) > 1e-6
    assert all(torch.equal(estimated[name], found[name]) for name in expected if name.startswith("head"))


def test_losses_within_a_sub_chain_stay_exact():
    """With nothing passed at the cuts, what is left is the truncated gradient: each loss within its own sub-chain."""
    net = EveryStep(nn.RNNCell)
    targets = Y[:, None].expand(-1, 7).contiguous()

    def loss(output, target):
        return F.cross_entropy(output.transpose(1, 2), target)

    parameters = list(net.cell.parameters())
    step = rewrite(net, UlrCut("cell", copies=512, every=2, sigma=1e-3), loss=loss, example=(SEQUENCES,))
    found = torch.autograd.grad(step(SEQUENCES, target=targets), parameters)
    expected = torch.autograd.grad(loss(net(SEQUENCES), targets), parameters)
    h, outputs = torch.zeros(12, 5, dtype=torch.float64), []
    for t in range(7):
        h = net.cell(SEQUENCES[:, t], h.detach() if t % 2 == 0 else h)
        outputs.append(net.head(h))
    truncated = torch.autograd.grad(loss(torch.stack(outputs, 1), targets), parameters)
    for a, b, c in zip(found, expected, truncated, strict=True):
        assert float((a - b).norm()) < 0.1 * float(b.norm())
        assert float((c - b).norm()) > 2 * float((a - b).norm())  # a cut that passes zero is seen


def test_what_cannot_be_cut_into_pieces_is_refused():
    for module, message in (
        (nn.GRU(6, 5, bidirectional=True), "second direction"),
        (nn.GRU(6, 5, num_layers=2, dropout=0.5), "dropout between layers"),
    ):
        net = Recurrent(lambda *_, m=module, **__: m.double())
        net.rnn.batch_first = True
        net.head = nn.Linear(15 if module.bidirectional else 10, 4).double()
        with pytest.raises(RewriteError, match=message):
            cuts.cut(net, UlrCut("rnn", every=2), SEQUENCES)
    with pytest.raises(RewriteError, match="no sub-chains of 7"):
        cuts.cut(Loop(nn.GRUCell), UlrCut("cell", every=7), SEQUENCES)
    with pytest.raises(RewriteError, match="counts all calls"):
        cuts.cut(Loop(nn.GRUCell), UlrCut("cell@1", every=2), SEQUENCES)
    with pytest.raises(RewriteError, match="no number of links"):
        UlrCut("cell", every=0)
