"""Train a small byte model by Highway-BP: the same weights and batches with 0, 1 and 3 iterations, and exactly.

Twelve residual units, six of attention and six perceptrons, learn to tell the next byte of Python's language reference,
which comes with Python. `Highway` takes their gradient from all units at once; with k iterations it holds every path
back that meets at most k branches. On one device that saves nothing, as the figure's times say; the point is how much
of the gradient a few iterations hold.

    python -m rewriter.examples.highway
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter import Highway, Plan, rewrite
from rewriter.examples.command import chosen, new_figure, progress
from rewriter.examples.random_forest import one_thread

LAYERS, WIDTH, HEADS, CONTEXT, ROWS = 6, 64, 4, 48, 8
RATE, WARM = 2e-3, 10  # of Adam; steps until it is reached
TRAINED, SHOWN = (0, 1, 3), range(6)  # iterations: to train with; to compare with the exact gradient


class Attention(nn.Module):
    """x + attention(norm(x)), causal."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.split, self.join = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        parts = self.split(self.norm(x)).view(rows, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        result: Tensor = x + self.join(mixed.transpose(1, 2).reshape(rows, length, width))
        return result


class Perceptron(nn.Module):
    """x + down(gelu(up(norm(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return result


class Bytes(nn.Module):
    """Bytes (rows, length) -> logits of the next ones (rows, 256, length)."""

    def __init__(self, seed: int, layers: int = LAYERS, width: int = WIDTH, context: int = CONTEXT) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.byte = nn.Embedding(256, width)
            self.place = nn.Parameter(0.1 * torch.randn(context, width))
            self.units = nn.Sequential(*[kind(width) for _ in range(layers) for kind in (Attention, Perceptron)])
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, text: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.units(self.byte(text) + self.place)))
        return logits.transpose(1, 2)


def batches(seed: int, rows: int = ROWS, context: int = CONTEXT) -> Iterator[tuple[Tensor, Tensor]]:
    """Random windows of Python's reference and the same one byte on, each (rows, context), without end."""
    from pydoc_data.topics import topics

    text = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - context - 1, (rows,), generator=generator)
        windows = text[starts[:, None] + torch.arange(context + 1)]
        yield windows[:, :-1], windows[:, 1:]


def estimated(model: Bytes, iterations: int | tuple[tuple[int, int], ...], example: Tensor) -> Callable[..., Tensor]:
    """The model with the gradient of its units from so many iterations; called with (text, target=)."""
    entry = Highway("units", iterations=iterations, segments=None)
    return rewrite(model, Plan([entry]), loss=nn.CrossEntropyLoss(), example=(example,))


def cosines(model: Bytes, seed: int, counts: Sequence[int] = SHOWN) -> list[float]:
    """Of the gradient of all parameters with its exact value, for each number of iterations, on one batch."""
    text, target = next(batches(seed, context=len(model.place)))
    parameters = list(model.parameters())

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([each.flatten() for each in torch.autograd.grad(loss, parameters)]).double()

    exact = gradient(F.cross_entropy(model(text), target))
    step = estimated(model, tuple(enumerate(counts)), text)  # a schedule: the next count at every forward
    found = [gradient(step(text, target=target)) for _ in counts]
    return [float(F.cosine_similarity(each, exact, dim=0)) for each in found]


@dataclass
class Curve:
    """One run: the loss after every step, and the seconds that all of them took."""

    name: str
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def end(self) -> float:
        """Mean loss of the last tenth."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last)


def train(name: str, loss_of: Callable[[Tensor, Tensor], Tensor], weights: nn.Module, seed: int, steps: int) -> Curve:
    """Trains for `steps` batches of ROWS; the seed decides the batches."""
    optimizer = torch.optim.Adam(weights.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM))
    curve, start = Curve(name), time.perf_counter()
    for _, (text, target) in zip(range(steps), batches(seed), strict=False):
        loss = loss_of(text, target)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        curve.losses.append(loss.item())
    curve.seconds = time.perf_counter() - start
    progress(f"{name:<18} {steps} steps  loss {curve.end:.3f}  {curve.seconds:5.1f} s")
    return curve


@dataclass(frozen=True)
class Result:
    """curves: of the exact run and of each of TRAINED; before, after: cosines for SHOWN, at the exact run's ends."""

    curves: tuple[Curve, ...]
    before: list[float]
    after: list[float]


def run(seed: int, steps: int) -> Result:
    """All runs from the same weights, on the same batches."""
    plain = Bytes(seed)
    before = cosines(plain, seed + 1)
    example = next(batches(seed))[0]
    curves = [train("back-propagation", lambda text, target: F.cross_entropy(plain(text), target), plain, seed, steps)]
    for count in TRAINED:
        model = Bytes(seed)
        step = estimated(model, count, example)
        name = f"Highway, k = {count}"
        curves.append(train(name, lambda text, target, step=step: step(text, target=target), model, seed, steps))  # type: ignore[misc]
    return Result(tuple(curves), before, cosines(plain, seed + 1))


def draw(result: Result, path: Path) -> Path:
    """Cosine against iterations; loss, averaged over 10 steps, against steps."""
    figure, axes = new_figure(9, 3.6, columns=2)
    axes[0, 0].plot(SHOWN, result.before, "o-", label="before training")
    axes[0, 0].plot(SHOWN, result.after, "s--", label="after training exactly")
    axes[0, 0].set(xlabel="iterations k", ylabel="cosine with the exact gradient")
    for curve in result.curves:
        window = min(10, len(curve.losses))
        smooth = F.avg_pool1d(torch.tensor(curve.losses)[None, None], window, 1)[0, 0].tolist()
        label = f"{curve.name} ({curve.seconds:.0f} s)"
        axes[0, 1].plot(range(window, len(curve.losses) + 1), smooth, label=label, linewidth=1.2)
    axes[0, 1].set(xlabel="steps", ylabel="loss, nats per byte")
    for axis in axes[0]:
        axis.grid(alpha=0.25)
        axis.legend()
    figure.savefig(path, dpi=120)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Train all ways, write highway.png. Returns the exit status."""
    options = chosen(arguments, str(__doc__).splitlines()[0], "highway", ("matplotlib",))
    with one_thread():
        result = run(options.seed, 10 if options.quick else 120)
    for when, found in (("before", result.before), ("after", result.after)):
        shown = ", ".join(f"{cosine:.4f}" for cosine in found)
        progress(f"cosine with the exact gradient {when} training, k = 0, 1, ...: {shown}")
    progress(f"Figure: {draw(result, options.folder / 'highway.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
