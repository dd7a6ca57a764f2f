"""Fit an adapter in front of a frozen classifier that is only an ONNX file, by losses alone.

A camera delivers digits a pixel off, washed out and noisy; the classifiers, a network and a forest, were fitted to
clean ones and read less than half of them. A linear adapter before the classifier, at first the identity, learns from
labelled images of the camera. `UlrCut("adapter")` needs nothing of what follows but the loss of each image, so it also
works where the file tells labels only; `BlackBox("classifier")` takes differences of the answers. Both get about as
many evaluations of the file. Of the network the weights are known too: back-propagation through them is what both aim
at. What the adapters make of an image serves the classifier and need not please the eye.

    python -m rewriter.examples.domain_adaptation
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from rewriter import BlackBox, CallableBox, OnnxBox, Plan, UlrCut, rewrite
from rewriter.examples.command import chosen, new_figure, progress
from rewriter.examples.random_forest import Digits, one_thread

ROWS, RATE, POINTS = 64, 1e-2, 10
EXACT = "back-propagation"
LEAST = 1e-3  # added to probabilities, so that a confident mistake has a gradient
EVALUATIONS = 16  # of the classifier, for every row beside the forward
PAIRS = EVALUATIONS // 2
WAYS = {  # entries; and whether only labels come back. Noise, steps and differences: the best of a few on another seed.
    "UlrCut": (UlrCut("adapter", copies=EVALUATIONS, sigma=0.2), False),
    "BlackBox": (BlackBox("classifier", probes=EVALUATIONS, step_size=0.5), False),
    "UlrCut, labels only": (UlrCut("adapter", copies=EVALUATIONS, sigma=0.3), True),
    "BlackBox, labels only": (BlackBox("classifier", probes=PAIRS, difference="central", step_size=1.0), True),
}


def fit_classifiers(digits: Digits, seed: int, folder: Path) -> tuple[dict[str, Path], nn.Module]:
    """Fit a network and a forest to clean images and write them as ONNX; returns the files, and the network's weights
    as a frozen module that gives the same probabilities."""
    from skl2onnx import to_onnx
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.neural_network import MLPClassifier

    images, labels = digits.images.numpy(), digits.labels.numpy()
    network = MLPClassifier((64,), learning_rate_init=0.01, alpha=1.0, max_iter=300, random_state=seed)
    forest = RandomForestClassifier(60, max_depth=10, random_state=seed)
    files = {}
    for name, model in (("network", network), ("forest", forest)):
        files[name] = folder / f"{name}.onnx"
        written = to_onnx(model.fit(images, labels), images[:1], options={"zipmap": False})
        files[name].write_bytes(written.SerializeToString())
    known = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10), nn.Softmax(1))
    values = zip(network.coefs_, network.intercepts_, strict=True)
    parts = [torch.from_numpy(part) for weights, bias in values for part in (weights.T, bias)]
    known.load_state_dict(dict(zip(known.state_dict(), parts, strict=True)))
    return files, known.requires_grad_(False)


def answers(file: Path, labels_only: bool) -> CallableBox:
    """What the file says of images (n, 64): probabilities (n, 10), or a one at the label and zeros."""
    box = OnnxBox(file)

    def said(images: NDArray[np.float32]) -> NDArray[np.float32]:
        labels, probabilities = (part.numpy() for part in box(torch.tensor(images)))
        found: NDArray[np.float32] = np.eye(10, dtype=np.float32)[labels] if labels_only else probabilities
        return found

    return CallableBox(said)


def seen_by_camera(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (n, 64) one pixel to the right, at half the contrast, brighter, with noise of 0.1."""
    moved = images.reshape(-1, 8, 8).roll(1, 2).reshape(-1, 64)
    return 0.3 + 0.5 * moved + 0.1 * torch.randn(images.shape, generator=generator)


class Adapted(nn.Module):
    """A linear adapter, at first the identity, and a classifier behind it."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.adapter, self.classifier = nn.Linear(64, 64), classifier
        nn.init.eye_(self.adapter.weight)
        nn.init.zeros_(self.adapter.bias)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.adapter(images))
        return scores


def surprise(probabilities: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss((probabilities + LEAST).log(), labels)


def wrong(scores: Tensor, labels: Tensor) -> Tensor:
    """Share of wrong labels."""
    return 1 + F.nll_loss(scores, labels)


@dataclass
class Curve:
    """One run: accuracy on unseen images of the camera, the first before any step; evaluations: of the classifier
    while training, in rows."""

    classifier: str
    way: str
    model: Adapted
    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    evaluations: int = 0


def train(classifier: str, way: str, model: Adapted, digits: Digits, seed: int, steps: int) -> Curve:
    """Adam with a cosine schedule; the seed decides batches, the camera's noise, and the estimates."""
    curve = Curve(classifier, way, model)
    entry, labels_only = WAYS.get(way, (None, False))
    plan, loss = Plan([] if entry is None else [entry]), wrong if labels_only else surprise
    step = rewrite(model, plan, loss=loss, example=(digits.images[:ROWS],), seed=seed)
    optimizer = torch.optim.Adam(model.adapter.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    unseen = seen_by_camera(digits.test_images.repeat(2, 1), torch.Generator().manual_seed(seed + 1_000_000))
    for number in range(steps + 1):
        if number % max(1, steps // POINTS) == 0:
            with torch.no_grad():
                right = model(unseen).argmax(1) == digits.test_labels.repeat(2)
            curve.steps.append(number)
            curve.accuracy.append(float(right.float().mean()))
        rows = torch.randint(len(digits.images), (ROWS,), generator=generator)
        optimizer.zero_grad()
        torch.autograd.backward(step(seen_by_camera(digits.images[rows], generator), target=digits.labels[rows]))
        optimizer.step()
        schedule.step()
    forwards = 0 if isinstance(entry, BlackBox) else ROWS * (steps + 1)  # a box counts them among its queries
    curve.evaluations = step.ledger.total("queries") + forwards
    progress(f"{classifier:<12}{way:<24}{curve.accuracy[0]:>8.3f}{curve.accuracy[-1]:>9.3f}{curve.evaluations:>13,}")
    return curve


def mosaic(images: Sequence[Tensor]) -> Tensor:
    """Lines of eight images (8, 64) with a margin between them, each line scaled to its own range."""
    ranged = [(each - each.quantile(0.02)) / (each.quantile(0.98) - each.quantile(0.02)) for each in images]
    lines = [F.pad(each.reshape(-1, 8, 8), (1, 1, 1, 1)) for each in ranged]
    return torch.cat([line.permute(1, 0, 2).flatten(1) for line in lines])


def draw(curves: Sequence[Curve], digits: Digits, seed: int, path: Path) -> Path:
    """Accuracy against steps for both classifiers; and unseen images before and after adapters trained by UlrCut."""
    names = list(dict.fromkeys(curve.classifier for curve in curves))
    figure, (panels,) = new_figure(13, 4.2, columns=len(names) + 1)
    styles = dict(zip((EXACT, *WAYS), (("k", ":"), ("C0", "-"), ("C1", "-"), ("C0", "--"), ("C1", "--")), strict=True))
    for axis, name in zip(panels, names, strict=False):
        for curve in [each for each in curves if each.classifier == name]:
            color, style = styles[curve.way]
            axis.plot(curve.steps, curve.accuracy, style, color=color, label=curve.way)
        axis.set(title=f"frozen {name}", xlabel="steps", ylabel="accuracy on unseen images", ylim=(0.1, 1))
        axis.grid(alpha=0.25)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(styles))
    clean = digits.test_images[:8]
    camera = seen_by_camera(clean, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        made = {c.classifier: c.model.adapter(camera) for c in curves if c.way == "UlrCut"}
    shown = {"clean": clean, "camera": camera, **{f"for the\n{name}": images for name, images in made.items()}}
    panels[-1].imshow(mosaic(list(shown.values())).numpy(), cmap="gray_r", vmin=0, vmax=1)
    panels[-1].set(title="what the adapters make of it", xticks=[])
    panels[-1].set_yticks([10 * line + 4.5 for line in range(len(shown))], list(shown))
    figure.savefig(path, dpi=120)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Train every adapter, write domain_adaptation.png. Returns the exit status."""
    needed = ("sklearn", "skl2onnx", "matplotlib")
    options = chosen(arguments, str(__doc__).splitlines()[0], "domain_adaptation", needed)
    steps = 20 if options.quick else 220
    progress(f"{'classifier':<12}{'gradient':<24}{'before':>8}{'after':>9}{'evaluations':>13}")
    with one_thread():
        digits = Digits.load(options.seed)
        files, known = fit_classifiers(digits, options.seed, options.folder)
        curves = [train("network", EXACT, Adapted(known), digits, options.seed, steps)]
        for name, file in files.items():
            for way, (_, labels_only) in WAYS.items():
                model = Adapted(answers(file, labels_only))
                curves.append(train(name, way, model, digits, options.seed, steps))
        path = draw(curves, digits, options.seed, options.folder / "domain_adaptation.png")
    progress(f"Figure: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
