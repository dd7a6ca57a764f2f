"""What is known of cuts: of what follows them, before it runs, and of their estimates, for reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .estimators.cut_estimator import CutEstimator
from .estimators.cut_options import CutOptions
from .estimators.quality import Quality


@dataclass(frozen=True)
class TailFacts:
    """What is known of what follows the cuts before it runs.

    kind: "box", "steps" (every way to the loss meets an operation without a derivative), "frozen", "trainable", or
    "layers" (trained, and cut off from the outputs itself);
    ratios: for each cut, cost of a step without copies in units of one copy; costs: of one copy, in units of the first
    cut's; noisy: a box there answers differently every time.
    """

    kind: str
    ratios: tuple[float, ...]
    costs: tuple[float, ...]
    noisy: bool = False


def described(
    cuts: Sequence[CutEstimator], layers: Sequence[tuple[str, str]], options: CutOptions, quality: Quality | None
) -> dict[str, Any]:
    """Plain facts of a chain's cuts, for reports. layers: name and kind of noise of each cut."""
    rows = [cut.rows_per_backward for cut in cuts]
    copies = sorted({cut.copies for cut in cuts})
    low, high = zip(*(cut.size.range for cut in cuts), strict=True)
    return {
        "cuts": len(cuts),
        "width": cuts[0].width,
        "copies": " to ".join(map(str, (copies[0], copies[-1])[: len(copies)])),
        "sigma": cuts[0].size.typical if quality else None,
        "learned": (min(low), max(high)) if options.sigma == "learned" else None,
        "across": options.across,
        "directions": options.directions,
        "antithetic": options.antithetic,
        "baseline": options.baseline_for(copies[0]),
        "allocation": options.allocation,
        "predicted_cosine": quality.predicted_cosine if quality else None,
        "measured_cosine": quality.measured_cosine if quality else None,
        "parameter_cosine": quality.parameter_cosine if quality else None,
        "bias": quality.bias if quality else None,
        "rows_per_backward": sum(each or 0 for each in rows) or None,
        "layers": [
            {"name": name, "noise": noise, **cut.describe()} for (name, noise), cut in zip(layers, cuts, strict=True)
        ],
    }
