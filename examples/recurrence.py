"""Train a recurrent cell of one's own on long sequences, twice: on the ordinary tape, and with `Deferred`.

The cell is to follow a room: heating and cooling switch at random, the temperature answers slowly, and 400 samples
make a sequence. No library has a kernel for this cell, a gated unit whose candidate is normalised, called in a Python
loop. Both runs start from the same weights and see the same batches, and both gradients are exact up to rounding; what
differs is how long backward takes.

    python -m rewriter.examples.recurrence
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter import Deferred, Plan, rewrite
from rewriter.examples.command import chosen, new_figure, progress
from rewriter.examples.random_forest import one_thread

SAMPLES, ROWS, WIDTH = 400, 16, 48
RATE = 5e-3  # of Adam, falling as a cosine
SWITCHED, SLOWNESS = 20, 40  # samples between two switchings; samples in which a step decays to 1 / e


class Cell(nn.Module):
    """h' = h + z (n - h): gate z = sigmoid(W [x, h] + b), candidate n = tanh(norm(V [x, h]))."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(inputs + width, width)
        self.candidate = nn.Linear(inputs + width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        nn.init.constant_(self.gate.bias, -3.0)  # remembers at first

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        both = torch.cat((x, h), 1)
        new = torch.tanh(self.norm(self.candidate(both)))
        result: Tensor = h + torch.sigmoid(self.gate(both)) * (new - h)
        return result


class Reader(nn.Module):
    """Reads currents (samples, rows, 1) with the cell and tells the temperatures, (samples, rows), from its states."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.cell, self.head = Cell(1, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        states = []
        for sample in x.unbind(0):
            h = self.cell(sample, h)
            states.append(h)
        temperatures: Tensor = self.head(torch.stack(states)).squeeze(2)
        return temperatures


def sequences(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Currents (SAMPLES, ROWS, 1) and the temperatures they make, (SAMPLES, ROWS), of about unit variance."""
    levels = 2 * torch.rand((SAMPLES // SWITCHED, ROWS), generator=generator) - 1
    currents = levels.repeat_interleave(SWITCHED, 0)
    temperature, found = torch.zeros(ROWS), []
    for current in currents:
        temperature = temperature + (current - temperature) / SLOWNESS
        found.append(temperature)
    return currents.unsqueeze(2), 4 * torch.stack(found)


@dataclass
class Curve:
    """One run: the loss, and the seconds since its start, after every step; backward: seconds spent in it."""

    name: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    backward: float = 0.0


def train(name: str, model: Callable[[Tensor, Tensor], Tensor], weights: nn.Module, seed: int, steps: int) -> Curve:
    """Trains for `steps` batches of ROWS; the seed decides the batches."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(weights.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    curve, start = Curve(name), time.perf_counter()
    for number in range(1, steps + 1):
        x, temperatures = sequences(generator)
        loss = F.mse_loss(model(x, torch.zeros(ROWS, WIDTH)), temperatures)
        optimizer.zero_grad()
        before = time.perf_counter()
        torch.autograd.backward(loss)
        curve.backward += time.perf_counter() - before
        torch.nn.utils.clip_grad_norm_(weights.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        curve.losses.append(loss.item())
        curve.seconds.append(time.perf_counter() - start)
        if number % max(1, steps // 5) == 0:
            progress(f"{name:<18} step {number:>4}  loss {loss.item():.3f}  {curve.seconds[-1]:5.1f} s")
    return curve


@dataclass(frozen=True)
class Result:
    """curves: the ordinary tape's and Deferred's; apart: of their gradients at the start, relative, in float32."""

    curves: tuple[Curve, Curve]
    apart: float


def run(seed: int, steps: int) -> Result:
    """Both ways, from the same weights on the same batches."""
    plain, model = Reader(seed), Reader(seed)
    x, temperatures = sequences(torch.Generator().manual_seed(seed))
    given = (x, torch.zeros(ROWS, WIDTH))
    step = rewrite(model, Plan([Deferred("cell")]), example=given)
    first = [
        torch.autograd.grad(F.mse_loss(call(*given), temperatures), list(weights.parameters()))
        for call, weights in ((plain, plain), (step, model))
    ]
    off = torch.stack([(a - b).norm() / a.norm() for a, b in zip(*first, strict=True)]).max().item()
    curves = train("ordinary tape", plain, plain, seed, steps), train("Deferred", step, model, seed, steps)
    return Result(curves, off)


def draw(curves: Sequence[Curve], path: Path) -> Path:
    """The loss, averaged over 10 steps, against steps and against seconds."""
    figure, axes = new_figure(9, 3.6, columns=2)
    for curve, style in zip(curves, ("-", "--"), strict=True):
        window = min(10, len(curve.losses))
        smooth = F.avg_pool1d(torch.tensor(curve.losses)[None, None], window, 1)[0, 0].tolist()
        axes[0, 0].plot(range(window, len(curve.losses) + 1), smooth, style, label=curve.name)
        axes[0, 1].plot(curve.seconds[window - 1 :], smooth, style, label=curve.name)
    for axis, label in zip(axes[0], ("steps", "seconds"), strict=True):
        axis.set(xlabel=label, ylabel="squared error, 1 = guessing", yscale="log")
        axis.grid(alpha=0.25)
    axes[0, 0].legend()
    figure.savefig(path, dpi=120)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Train both ways, write recurrence.png. Returns the exit status."""
    options = chosen(arguments, str(__doc__).splitlines()[0], "recurrence", ("matplotlib",))
    with one_thread():
        result = run(options.seed, 10 if options.quick else 80)
    plain, deferred = result.curves
    progress(f"the first gradients differ by {result.apart:.0e} of themselves, in float32")
    progress(f"seconds in backward: {plain.backward:.1f} on the ordinary tape, {deferred.backward:.1f} with Deferred")
    progress(f"Figure: {draw(result.curves, options.folder / 'recurrence.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
