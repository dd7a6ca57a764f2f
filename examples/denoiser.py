"""Train a denoiser in front of a frozen classifier that is only an ONNX file, without ever seeing a clean image.

The digits have stripes: a random brightness in every row of pixels, and a little noise. The classifier, trained on
clean digits, reads a third of them. All the denoiser gets is striped images, their labels, and the probabilities that
come back from the file. What it makes of them serves the classifier and need not please the eye. A twin gets what one
rarely has, the clean images, and learns to reproduce them.

    python -m rewriter.examples.denoiser
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter import BlackBox, OnnxBox, Plan, rewrite
from rewriter.examples.command import chosen, new_figure, progress
from rewriter.examples.random_forest import Digits, one_thread

STRIPES, NOISE = 0.6, 0.15  # standard deviations of a row's brightness and of a pixel; pixels lie in 0..1
RATE, CLOSENESS = 1e-2, 0.1  # of Adam; weight of the squared change of a pixel
PROBES: dict[str, Any] = {"probes": 4}  # of 64 pixels


def fit_classifier(digits: Digits, seed: int, path: Path) -> Path:
    """Fit a network of 64 hidden units on the clean images and write it to `path` as ONNX: label, probabilities."""
    from skl2onnx import to_onnx
    from sklearn.neural_network import MLPClassifier

    images = digits.images.numpy()
    classifier = MLPClassifier((64,), learning_rate_init=0.01, max_iter=500, random_state=seed).fit(
        images, digits.labels.numpy()
    )
    path.write_bytes(to_onnx(classifier, images[:1], options={"zipmap": False}).SerializeToString())
    return path


def striped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Stripes and noise on images (n, 64)."""
    rows = STRIPES * torch.randn((len(images), 8, 1), generator=generator)
    return images + rows.expand(-1, -1, 8).reshape(-1, 64) + NOISE * torch.randn(images.shape, generator=generator)


class Denoiser(nn.Module):
    """Adds a correction, at first zero, that two convolutions compute; rows of pixels are seen whole."""

    def __init__(self) -> None:
        super().__init__()
        self.correction = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 16, (3, 7), padding=(1, 3)),
            nn.ReLU(),
            nn.Conv2d(16, 1, 3, padding=1),
            nn.Flatten(),
        )
        last = self.correction[3]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        cleaned: Tensor = images + self.correction(images)
        return cleaned


class Pipeline(nn.Module):
    """The denoiser and the frozen classifier behind it."""

    def __init__(self, classifier: Path, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.denoiser = Denoiser()
        self.classifier = OnnxBox(classifier)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Cleaned images and probabilities (n, 10)."""
        cleaned = self.denoiser(images)
        _, probabilities = self.classifier(cleaned)
        return cleaned, probabilities


def task_loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy of the probabilities, and CLOSENESS times the squared change; target: labels, striped images.

    A probability below 1e-6 has no gradient: such rows are hopeless for now, and are not probed.
    """
    cleaned, probabilities = output
    labels, images = target
    return F.nll_loss(probabilities.clamp_min(1e-6).log(), labels) + CLOSENESS * F.mse_loss(cleaned, images)


@dataclass(frozen=True)
class Result:
    """What came out on test images.

    accuracy: share read correctly, and error: mean square of pixels against the clean image; by "clean" (no stripes),
    "striped", "denoised" (ours) and "denoised, knowing clean images"; images: (8, 64) of each; rows: evaluated by the
    classifier while training; quality: measured cosine of one row's estimated with its true gradient
    """

    accuracy: dict[str, float]
    error: dict[str, float]
    images: dict[str, Tensor]
    rows: int
    quality: float | None


def run(folder: Path, seed: int, steps: int, report: Callable[[int, float], None] = lambda step, loss: None) -> Result:
    """Train both denoisers for `steps` batches of 128 and test them on four stripings of the test images."""
    digits = Digits.load(seed)
    classifier = fit_classifier(digits, seed, folder / "classifier.onnx")
    ours, twin = Pipeline(classifier, seed), Pipeline(classifier, seed)
    step = rewrite(ours, Plan([BlackBox("classifier", **PROBES)]), loss=task_loss, seed=seed)

    def task(images: Tensor, labels: Tensor, _: Tensor) -> Tensor:
        loss: Tensor = step(images, target=(labels, images))
        return loss

    def reproduce(images: Tensor, _: Tensor, clean: Tensor) -> Tensor:
        return F.mse_loss(twin.denoiser(images), clean)

    _train(ours.denoiser, task, digits, seed, steps, report)
    _train(twin.denoiser, reproduce, digits, seed, steps, lambda step, loss: None)
    quality = step.quality["classifier"]
    rows = step.ledger.total("queries") + step.ledger.total("capture")
    return _tested(digits, seed, ours, twin, rows, quality.measured_cosine if quality else None)


def _train(
    denoiser: nn.Module,
    loss_of: Callable[[Tensor, Tensor, Tensor], Tensor],
    digits: Digits,
    seed: int,
    steps: int,
    report: Callable[[int, float], None],
) -> None:
    """Adam with a cosine schedule, on stripes drawn anew for every batch, the same for both denoisers."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for number, (clean, labels) in zip(range(1, steps + 1), digits.batches(seed), strict=False):
        optimizer.zero_grad()
        loss = loss_of(striped(clean, generator), labels, clean)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        report(number, loss.item())


@torch.no_grad()
def _tested(digits: Digits, seed: int, ours: Pipeline, twin: Pipeline, rows: int, quality: float | None) -> Result:
    clean, labels = digits.test_images.repeat(4, 1), digits.test_labels.repeat(4)
    noisy = striped(clean, torch.Generator().manual_seed(seed + 1_000_000))
    shown = {
        "clean": clean,
        "striped": noisy,
        "denoised": ours.denoiser(noisy),
        "denoised, knowing clean images": twin.denoiser(noisy),
    }
    read = {name: ours.classifier(images)[0] for name, images in shown.items()}
    return Result(
        {name: float((found == labels).float().mean()) for name, found in read.items()},
        {name: float(F.mse_loss(images, clean)) for name, images in shown.items()},
        {name: images[:8] for name, images in shown.items()},
        rows,
        quality,
    )


def draw(result: Result, path: Path) -> Path:
    """Eight test images: clean, striped, and what the two denoisers make of them."""
    figure, axes = new_figure(9, 4.8, rows=4, columns=8)
    for line, (name, images) in zip(axes, result.images.items(), strict=True):
        for place, image in zip(line, images, strict=True):
            place.imshow(np.clip(image.reshape(8, 8).numpy(), -0.5, 1.5), cmap="gray_r", vmin=-0.5, vmax=1.5)
            place.set(xticks=[], yticks=[])
        label = name.replace(", ", ",\n") + f"\n{result.accuracy[name]:.1%} read"
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle("What the frozen classifier reads correctly, of all test images", fontsize=10)
    figure.savefig(path, dpi=120)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, test, write denoiser.png. Returns the exit status."""
    options = chosen(arguments, str(__doc__).splitlines()[0], "denoiser", ("sklearn", "skl2onnx", "matplotlib"))
    steps = 100 if options.quick else 1000

    def report(step: int, loss: float) -> None:
        if step % (steps // 5) == 0:
            progress(f"step {step:>5}  loss {loss:.3f}")

    with one_thread():
        result = run(options.folder, options.seed, steps, report)
    progress(f"{'test images':<32}{'accuracy':>9}{'pixel error':>13}")
    for name in result.accuracy:
        progress(f"{name:<32}{result.accuracy[name]:>9.3f}{result.error[name]:>13.3f}")
    quality = "unknown" if result.quality is None else f"{result.quality:.2f}"
    progress(f"{result.rows:,} rows evaluated by the classifier; measured gradient quality of a row: {quality}")
    progress(f"Figure: {draw(result, options.folder / 'denoiser.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
