"""Compare networks trained by likelihood ratios with back-propagated ones of the same shape under noise and attacks.

Both layers of a small network for digits learn by `UlrCut`: every gradient comes from losses of noisy copies of the
layer's result. Such training smooths the loss, which is said to make networks robust. Whether it is that, or the noise,
or only that they fit their images less closely, two controls tell: back-propagation through the same noise, and
back-propagation stopped where it fits the training images as well as `UlrCut` does in the end. All networks are tested
alike: unseen images with Gaussian noise, and with a step along the sign of their own exact gradient (FGSM).

    python -m rewriter.examples.robustness
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter import Plan, UlrCut, rewrite
from rewriter.examples.command import chosen, mean_and_error, new_figure, progress
from rewriter.examples.random_forest import Digits, one_thread

WIDTH, ROWS, RATE, COPIES = 48, 50, 5e-3, 8
LARGE = 0.5  # noise; "auto" starts at a tenth of a value's deviation
NOISES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)  # deviation of a pixel's noise; pixels lie in 0..1
ATTACKS = (0.0, 0.05, 0.1, 0.15, 0.2)  # step of every pixel
SHOWN = {"clean": ("noise", 0), "noise .3": ("noise", 3), "noise .5": ("noise", 5), "FGSM .05": ("attack", 1)} | {
    "FGSM .1": ("attack", 2)
}
METHODS = ("BP", "BP, stopped early", "BP, noise .5", "ULR, auto noise", "ULR, noise .5")


class Network(nn.Module):
    """Images (rows, 64) -> scores of digits; noise: on what both layers return, while training."""

    def __init__(self, seed: int, noise: float) -> None:
        super().__init__()
        self.noise = noise
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.head = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.noisy(self.head(torch.relu(self.noisy(self.first(images)))))
        return scores

    def noisy(self, value: Tensor) -> Tensor:
        return value + self.noise * torch.randn_like(value) if self.training and self.noise else value


@dataclass(frozen=True)
class Tested:
    """One trained network. fit: its cross entropy on the training images; noise, attack: accuracy on unseen images for
    each of NOISES and ATTACKS."""

    method: str
    seed: int
    fit: float
    noise: tuple[float, ...]
    attack: tuple[float, ...]

    def at(self, column: str) -> float:
        kind, place = SHOWN[column]
        return (self.noise if kind == "noise" else self.attack)[place]


def train(method: str, digits: Digits, seed: int, epochs: int, enough: float = 0.0) -> Tested:
    """Adam; stops where the loss on the training images falls to `enough`. The seed decides weights, batches, noise."""
    network = Network(seed, LARGE if method == "BP, noise .5" else 0.0)
    sigma = LARGE if method == "ULR, noise .5" else "auto"
    plan = Plan([UlrCut(layer, copies=COPIES, sigma=sigma) for layer in ("first", "head")])
    step = rewrite(
        network,
        plan if method.startswith("ULR") else Plan([]),
        loss=F.cross_entropy,
        example=(digits.images[:ROWS],),
        seed=seed,
    )
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(digits.images), generator=generator), ROWS):
            loss = step(digits.images[rows], target=digits.labels[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            if enough and fit_of(network, digits) <= enough:
                return tested(method, network, digits, seed)
    return tested(method, network, digits, seed)


@torch.no_grad()
def fit_of(network: Network, digits: Digits) -> float:
    training = network.training
    loss = F.cross_entropy(network.eval()(digits.images), digits.labels)
    network.train(training)
    return float(loss)


def tested(method: str, network: Network, digits: Digits, seed: int) -> Tested:
    """On the same noise for all methods; the attack follows the network's own gradient."""
    network.eval()
    images, labels = digits.test_images.clone().requires_grad_(), digits.test_labels
    (gradient,) = torch.autograd.grad(F.cross_entropy(network(images), labels), images)
    drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed + 1_000_000))

    @torch.no_grad()
    def accuracy(change: Tensor) -> float:
        return float((network(images + change).argmax(1) == labels).float().mean())

    noise = tuple([accuracy(size * drawn) for size in NOISES])
    attack = tuple([accuracy(size * gradient.sign()) for size in ATTACKS])
    return Tested(method, seed, fit_of(network, digits), noise, attack)


def of_seed(seed: int, epochs: int) -> list[Tested]:
    """All methods, from the same weights on the same batches."""
    digits = Digits.load(seed)
    found = {name: train(name, digits, seed, epochs) for name in METHODS if name != "BP, stopped early"}
    enough = found["ULR, auto noise"].fit
    found["BP, stopped early"] = train("BP, stopped early", digits, seed, epochs, enough)
    return [found[name] for name in METHODS]


def differences(results: Sequence[Tested], one: str, other: str) -> str:
    """Of accuracies, one minus other, paired by seed: mean and standard error in points."""
    pairs = zip([r for r in results if r.method == one], [r for r in results if r.method == other], strict=True)
    apart = [{column: 100 * (a.at(column) - b.at(column)) for column in SHOWN} for a, b in pairs]
    found = {column: mean_and_error([each[column] for each in apart]) for column in SHOWN}
    return "".join(f"{f'{mean:+.1f} +- {error:.1f}':>14}" for mean, error in found.values())


def table(results: Sequence[Tested]) -> str:
    """Means and standard errors over seeds, and paired differences."""
    lines = [f"{'percent of unseen images':<36}" + "".join(f"{column:>14}" for column in SHOWN) + f"{'fit':>8}"]
    for method in METHODS:
        of_it = [each for each in results if each.method == method]
        found = [mean_and_error([100 * each.at(column) for each in of_it]) for column in SHOWN]
        fit, _ = mean_and_error([each.fit for each in of_it])
        columns = "".join(f"{f'{mean:.1f} +- {error:.1f}':>14}" for mean, error in found)
        lines.append(f"{method:<36}{columns}{fit:>8.3f}")
    lines.append("paired differences, points")
    for one in METHODS[3:]:
        for other in METHODS[:3]:
            lines.append(f"{f'{one} - {other}':<36}{differences(results, one, other)}")
    return "\n".join(lines)


def draw(results: Sequence[Tested], path: Path) -> Path:
    """Accuracy against the size of the noise and of the attack, means with standard errors."""
    figure, (panels,) = new_figure(10, 3.9, columns=2)
    sizes = {"noise": NOISES, "attack": ATTACKS}
    labels = ("deviation of Gaussian noise on the pixels", "step of the attack (FGSM)")
    for axis, kind, label in zip(panels, sizes, labels, strict=True):
        for method, style in zip(METHODS, ("k-", "k--", "k:", "C0-", "C1-"), strict=True):
            curves = [getattr(each, kind) for each in results if each.method == method]
            points = [mean_and_error(values) for values in zip(*curves, strict=True)]
            means, errors = zip(*points, strict=True)
            axis.errorbar(sizes[kind], means, errors, fmt=style, capsize=2, linewidth=1.3, label=method)
        axis.set(xlabel=label, ylabel="accuracy on unseen images", ylim=(0, 1))
        axis.grid(alpha=0.25)
    panels[0].legend(loc="lower left")
    figure.savefig(path, dpi=120)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and test all networks, write robustness.png. Returns the exit status."""
    options = chosen(arguments, str(__doc__).splitlines()[0], "robustness", ("sklearn", "matplotlib"))
    epochs, seeds = (2, 2) if options.quick else (8, 5)
    with one_thread():
        results = [each for seed in range(seeds) for each in of_seed(options.seed + seed, epochs)]
    progress(table(results))
    progress("fit: cross entropy on the training images; ranges are standard errors over seeds")
    progress(f"Figure: {draw(results, options.folder / 'robustness.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
