"""Train a network of true threshold spikes on digits through a cut, beside the surrogate gradient one would use.

The pixels make a current into leaky units, which spike at 1 and are reset; the rates of their spikes are read out. A
spike has no derivative, so the tape gives the layer before the spikes a gradient of zero. `UlrCut("current")` takes it
from losses of noisy copies of the current: nothing of the network is smoothed or replaced, and nothing is unrolled
backward in time. The surrogate is a slope invented for backward. All methods start from the same weights and see the
same batches.

    python -m rewriter.examples.spiking
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter import Plan, UlrCut, rewrite
from rewriter.examples.command import chosen, mean_and_error, new_figure, progress
from rewriter.examples.random_forest import Digits, one_thread
from rewriter.rewritten import Rewritten

WIDTH, STEPS, LEAK = 48, 8, 0.8
ROWS, RATE = 50, 5e-3
COPIES, SIGMA = 12, 0.2  # of the current, whose threshold is 1
METHODS = {
    "UlrCut": "the true spikes, losses of noisy copies of the current",
    "surrogate": "back-propagation through time with 1 / (1 + 10 |potential - 1|)^2 for a spike's slope",
    "the tape": "back-propagation as it is: zero before the spikes, so only the readout learns",
}


class Surrogate(torch.autograd.Function):
    """A spike forward; backward the slope of a fast sigmoid (Zenke and Ganguli 2018)."""

    @staticmethod
    def forward(ctx, potential: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(potential)
        return (potential > 1).float()

    @staticmethod
    def backward(ctx, cotangent: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        (potential,) = ctx.saved_tensors
        slope: Tensor = 1 / (1 + 10 * (potential - 1).abs()) ** 2
        return cotangent * slope


class Spiking(nn.Module):
    """Images (rows, 64) -> scores of digits; surrogate: with a slope for spikes in backward."""

    def __init__(self, seed: int, surrogate: bool) -> None:
        super().__init__()
        self.surrogate = surrogate
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.current, self.readout = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 10)

    def spikes(self, current: Tensor) -> list[Tensor]:
        """Of every step, (rows, WIDTH)."""
        potential = spiking = torch.zeros_like(current)
        found = []
        for _ in range(STEPS):
            potential = LEAK * potential * (1 - spiking) + current
            spiking = Surrogate.apply(potential) if self.surrogate else (potential > 1).float()  # type: ignore[no-untyped-call]
            found.append(spiking)
        return found

    def forward(self, images: Tensor) -> Tensor:
        rates = torch.stack(self.spikes(self.current(images))).mean(0)
        scores: Tensor = self.readout(rates)
        return scores


@dataclass
class Curve:
    """One run: accuracy on unseen images after every epoch; moved: how far the weights before the spikes went,
    relative; forwards: evaluations of the spikes for one row of a batch."""

    method: str
    network: Spiking
    accuracy: list[float] = field(default_factory=list)
    moved: float = 0.0
    forwards: float = 1.0
    seconds: float = 0.0


def cut(network: Spiking, example: Tensor, seed: int) -> Rewritten:
    """The network with a cut at the current, called with (images, target=labels)."""
    plan = Plan([UlrCut("current", copies=COPIES, sigma=SIGMA)])
    return rewrite(network, plan, loss=F.cross_entropy, example=(example,), seed=seed)


def train(method: str, digits: Digits, seed: int, epochs: int) -> Curve:
    """Adam; the seed decides weights, batches and noise."""
    network = Spiking(seed, surrogate=method == "surrogate")
    curve, start = Curve(method, network), time.perf_counter()
    step = cut(network, digits.images[:ROWS], seed) if method == "UlrCut" else None
    before = network.current.weight.detach().clone()
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(digits.images), generator=generator), ROWS):
            images, labels = digits.images[rows], digits.labels[rows]
            loss = F.cross_entropy(network(images), labels) if step is None else step(images, target=labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        with torch.no_grad():
            found = (network(digits.test_images).argmax(1) == digits.test_labels).float().mean()
        curve.accuracy.append(float(found))
    curve.seconds = time.perf_counter() - start
    curve.moved = float((network.current.weight - before).detach().norm() / before.norm())
    if step is not None:
        counts = step.ledger["current"]
        curve.forwards += (counts.probes + counts.quality) / (epochs * len(digits.images))
    return curve


def draw(curves: Sequence[Curve], digits: Digits, path: Path) -> Path:
    """Accuracy against epochs, every seed; and the spikes of the network trained by UlrCut on two unseen digits."""
    figure, ((learning, first, second),) = new_figure(12, 3.8, columns=3)
    colors = dict(zip(METHODS, ("C0", "C1", "grey"), strict=True))
    for method in METHODS:
        for number, curve in enumerate([each for each in curves if each.method == method]):
            epochs = range(1, len(curve.accuracy) + 1)
            label = None if number else method
            learning.plot(epochs, curve.accuracy, color=colors[method], alpha=0.8, linewidth=1.2, label=label)
    learning.set(xlabel="epochs", ylabel="accuracy on unseen images", ylim=(0, 1))
    learning.legend(loc="lower right")
    learning.grid(alpha=0.25)
    network = next(curve.network for curve in curves if curve.method == "UlrCut")
    for axis, row in zip((first, second), (0, 1), strict=True):
        image = digits.test_images[row : row + 1]
        with torch.no_grad():
            spikes = torch.stack(network.spikes(network.current(image)))[:, 0]
            read = int(network(image).argmax())
        axis.imshow(spikes.T.numpy(), cmap="gray_r", aspect="auto", origin="lower", extent=(0.5, STEPS + 0.5, 0, WIDTH))
        axis.vlines([step + 0.5 for step in range(1, STEPS)], 0, WIDTH, color="white", linewidth=4)
        axis.set(xlabel="step", ylabel="unit", ylim=(0, 1.25 * WIDTH), yticks=range(0, WIDTH + 1, 12))
        axis.set_title(f"spikes on a {int(digits.test_labels[row])}, read as {read}", fontsize=10)
        corner = axis.inset_axes((0.4, 0.81, 0.2, 0.18))
        corner.imshow(image.reshape(8, 8).numpy(), cmap="gray_r")
        corner.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=120)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Train with every method, write spiking.png. Returns the exit status."""
    options = chosen(arguments, str(__doc__).splitlines()[0], "spiking", ("sklearn", "matplotlib"))
    epochs, seeds = (3, 1) if options.quick else (15, 3)
    with one_thread():
        curves = []
        for seed in range(options.seed, options.seed + seeds):
            digits = Digits.load(seed)
            curves += [train(method, digits, seed, epochs) for method in METHODS]
    progress(f"{epochs} epochs, {seeds} seeds, mean accuracy and its standard error")
    progress(f"{'gradient':<12}{'accuracy':>16}{'moved':>8}{'forwards':>10}{'seconds':>9}")
    for method, meaning in METHODS.items():
        of_it = [curve for curve in curves if curve.method == method]
        mean, error = mean_and_error([curve.accuracy[-1] for curve in of_it])
        moved, _ = mean_and_error([curve.moved for curve in of_it])
        seconds, _ = mean_and_error([curve.seconds for curve in of_it])
        line = f"{method:<12}{f'{mean:.3f} +- {error:.3f}':>16}{moved:>8.2f}{of_it[0].forwards:>10.1f}{seconds:>9.1f}"
        progress(f"{line}  {meaning}")
    progress("moved: change of the weights before the spikes, relative; forwards: of the spikes, a row and step")
    progress(f"Figure: {draw(curves, Digits.load(options.seed), options.folder / 'spiking.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
