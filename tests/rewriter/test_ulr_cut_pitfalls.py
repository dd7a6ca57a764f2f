"""What can make estimates at a cut silently wrong: writes through views, couplings, changes in between, two cuts."""

import cuts
import pytest
import torch
import torch.nn.functional as F
from cuts import SEQUENCES, Loop, Net, X, Y
from torch import nn

from rewriter import BlackBox, CallableBox, Checkpoint, Horizon, Plan, RewriteError, RewriteWarning, UlrCut, rewrite


class Tail(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.run, self.last = forward, nn.Linear(5, 4)

    def forward(self, z):
        return self.last(self.run(z))


TAILS = {
    "view": lambda z: F.relu(z.view(-1, 5), inplace=True),
    "unsqueezed": lambda z: F.relu(z.unsqueeze(1), inplace=True).squeeze(1),
    "detached": lambda z: z * torch.tanh(z).detach().sum(1, keepdim=True),
    "dropout": lambda z: F.dropout(z * 1.5, 0.4, True, inplace=True),
}


@pytest.mark.parametrize("name", TAILS)
def test_estimates_are_those_of_the_tape(name):
    net = Net(Tail(TAILS[name]), nn.Linear(6, 5))
    loss, expected = cuts.gradients(net, X, Y)
    step = cuts.cut(net, UlrCut("encoder", copies=2000, sigma=1e-3))
    found_loss, found = cuts.gradients(step, X, Y)
    torch.testing.assert_close(found_loss, loss)
    assert cuts.error(found, expected) < 0.15
    halved = {n: g * (0.7 if n.startswith("encoder") else 1) for n, g in found.items()}
    assert cuts.error(halved, expected) > 0.15


def test_writes_that_nobody_reads_are_refused():
    def write(z):
        z.view(-1, 5).mul_(3)
        return z

    with pytest.raises(RewriteError, match="changes"):
        cuts.cut(Net(Tail(write), nn.Linear(6, 5)), UlrCut("encoder", copies=4))(X, target=Y).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_couplings_are_seen_under_small_noise_too(dtype):
    x = torch.randn(128, 6, dtype=dtype)
    y = torch.randint(0, 4, (128,))
    net = Net(Tail(lambda z: z - z.mean(0))).to(dtype)
    with pytest.raises(RewriteError, match="couples"):
        cuts.cut(net, UlrCut("encoder", copies=8, sigma=1e-3), x)(x, target=y).backward()
    alone = Net(Tail(lambda z: z - z.mean(1, keepdim=True))).to(dtype)
    cuts.cut(alone, UlrCut("encoder", copies=8, sigma=1e-3), x)(x, target=y).backward()


def test_what_backward_reads_again_may_not_change():
    net = Net()
    net.tail.requires_grad_(False)  # of what is trained, the tape itself notices
    step = cuts.cut(net, UlrCut("encoder", copies=4))
    loss = step(X, target=Y)
    with torch.no_grad():
        net.tail[0].weight *= 2
    with pytest.raises(RewriteError, match="changed in place between forward and backward"):
        loss.backward()
    step(X, target=Y).backward()


def test_odd_batches_leave_the_noise_as_it_is():
    def none(output, target):
        return F.cross_entropy(output, target, reduction="none")

    step = cuts.cut(Net(), UlrCut("encoder", copies=8), loss=none)
    step(X, target=Y).sum().backward()
    (cut,) = step.latest.emitted.regions["encoder"].rule.cuts
    before = cut.size.typical
    odd = X.clone()
    odd[3] = float("nan")
    step(odd, target=Y).sum().backward()
    step(X, target=Y).backward(torch.zeros(12, dtype=torch.float64))
    step(X[:0], target=Y[:0]).sum().backward()
    assert 0.5 < cut.size.typical / before < 2


def test_tensors_of_different_sizes_have_noise_of_their_own():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 5)

        def forward(self, x):
            z = self.inner(x)
            return torch.tanh(z), 1000 * z[:, :3]

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.tail = Two(), nn.Linear(5, 4)
            self.double()

        def forward(self, x):
            near, far = self.encoder(x)
            return self.tail(near) + F.pad(torch.sin(far / 1000), (0, 1))

    net = Both()
    _, expected = cuts.gradients(net, X, Y)
    step = cuts.cut(net, UlrCut("encoder", copies=2000))
    _, found = cuts.gradients(step, X, Y)
    assert cuts.error(found, expected) < 0.1


def test_one_value_is_cut_once():
    for plan in ([UlrCut("encoder.1"), UlrCut("encoder")], [UlrCut("encoder"), UlrCut("encoder.1")]):
        with pytest.raises(RewriteError, match="cuts it already"):
            cuts.cut(Net(), Plan(plan))


def test_entries_around_a_cut():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.start = nn.Linear(6, 5)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(4))
            self.middle, self.head = nn.Linear(5, 5), nn.Linear(5, 4)
            self.double()

        def forward(self, x):
            z = self.middle(self.start(x))
            for block in self.blocks:
                z = block(z)
            return self.head(z)

    for plan in (
        [Checkpoint("blocks"), UlrCut("middle", copies=4)],
        [UlrCut("middle", copies=4), Checkpoint("blocks")],
    ):
        net = Deep()
        _, expected = cuts.gradients(net, X, Y)
        _, found = cuts.exactly(cuts.cut(net, Plan(plan)), X, Y)
        assert cuts.error(found, expected) < 1e-12
    with pytest.raises(RewriteError, match="UlrCut lies"):
        cuts.cut(Deep(), Plan([Horizon("blocks", horizon=2), UlrCut("head", copies=4)]))


def test_a_box_and_the_cut_behind_it():
    net = Net(encoder=nn.Sequential(nn.Linear(6, 5), CallableBox(lambda z: z.round(2))))
    step = cuts.cut(net, Plan([BlackBox("encoder.1", probes=32), UlrCut("encoder.1", copies=512)]))
    _, expected = cuts.gradients(Net(encoder=nn.Sequential(nn.Linear(6, 5), nn.Identity())), X, Y)
    _, found = cuts.gradients(step, X, Y)
    assert set(step.latest.emitted.regions) == {"encoder.1", "encoder.1 (black-box)"}
    for name in ("encoder.0.weight", "encoder.0.bias"):
        a, b = found[name].flatten(), expected[name].flatten()
        assert a @ b / a.norm() / b.norm() > 0.9


def test_losses_that_are_no_tensors_and_noise_that_is_lost():
    step = rewrite(Net(), UlrCut("encoder", copies=4), loss=lambda o, t: {"loss": F.cross_entropy(o, t)}, example=(X,))
    with pytest.raises(RewriteError, match="returns a dict"):
        step(X, target=Y)
    low = cuts.cut(Net().float(), UlrCut("encoder", copies=4, sigma=1e-8), X.float())
    with pytest.warns(RewriteWarning, match="hardly differ"):
        low(X.float(), target=Y).backward()


def test_two_chains_of_one_cell():
    class Siamese(Loop):
        def forward(self, x):
            ends = []
            for part in (x, x.flip(1)):
                h = x.new_zeros(x.shape[0], 5)
                for t in range(4):
                    h = self.cell(part[:, t], h)
                ends.append(h)
            return self.head(ends[0] * ends[1])

    net = Siamese(nn.GRUCell)
    _, expected = cuts.gradients(net, SEQUENCES, Y)
    _, found = cuts.exactly(cuts.cut(net, UlrCut("cell", copies=2, every=2), SEQUENCES), SEQUENCES, Y)
    assert cuts.error(found, expected) < 1e-12


def test_a_length_that_pieces_were_made_for():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.head = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 4)
            self.double()

        def forward(self, x):
            return self.head(self.rnn(x)[1][0])

    net = Last()
    step = cuts.cut(net, UlrCut("rnn", copies=2, every=3), SEQUENCES)
    for length in (7, 9, 5, 7):
        x = torch.randn(12, length, 6, dtype=torch.float64)
        torch.testing.assert_close(step(x, target=Y), F.cross_entropy(net(x), Y))
