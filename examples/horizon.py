"""Train 24 residual blocks on digits with the loss a few blocks ahead instead of at their end, and see what it saves.

`Horizon` cuts the blocks into windows; the blocks of a window learn from the loss that the network's own head has on
the window's end, and no gradient crosses from one window to the next. Memory is then that of one window. The exact
competitor is `Checkpoint`, which runs blocks twice: `memory_plan` lists both, and this example draws them. All runs
start from the same weights and see the same batches.

    python -m rewriter.examples.horizon
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter import Checkpoint, Horizon, Plan, memory_plan, rewrite
from rewriter.examples.command import chosen, new_figure, progress
from rewriter.examples.random_forest import Digits, one_thread

BLOCKS, WIDTH, ROWS = 24, 64, 256
RATE = 1e-3
HORIZONS = (BLOCKS, 6, 2)
MIB = 2**20


class Block(nn.Module):
    """x + W gelu(V norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return y


class Network(nn.Module):
    """Images (n, 64) to scores (n, 10)."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem, self.norm, self.head = nn.Linear(64, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)
            self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(self.norm(x))
        return scores


@dataclass
class Training:
    """One run. losses: after each step, of its batch; held_out: of images never trained on, at the end; vjps: of one
    block, spent on a step."""

    horizon: int
    losses: list[float] = field(default_factory=list)
    held_out: float = 0.0
    accuracy: float = 0.0
    vjps: int = 0

    @property
    def name(self) -> str:
        return "exact" if self.horizon == BLOCKS else f"horizon {self.horizon}"


def train(digits: Digits, horizon: int, seed: int, steps: int) -> Training:
    """Adam for `steps` batches; the seed decides weights and batches."""
    network, training = Network(seed), Training(horizon)
    plan = Plan([Horizon("blocks", horizon, tape="never")])
    step = rewrite(network, plan, loss=F.cross_entropy, example=(digits.images[:ROWS],))
    optimizer = torch.optim.Adam(step.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(digits.images), (ROWS,), generator=generator)
        loss = step(digits.images[rows], target=digits.labels[rows])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        training.losses.append(loss.item())
    with torch.no_grad():
        scores = network(digits.test_images)
        training.held_out = F.cross_entropy(scores, digits.test_labels).item()
        training.accuracy = (scores.argmax(1) == digits.test_labels).float().mean().item()
    training.vjps = step.ledger["blocks"].vjps // steps
    progress(
        f"{training.name:<12} {training.vjps} block vjps a step   loss on unseen images {training.held_out:.3f}   "
        f"accuracy {training.accuracy:.3f}"
    )
    return training


@dataclass(frozen=True)
class Memory:
    """Predicted bytes: by horizon, by horizon with checkpointed blocks, and of the exact ways by name."""

    windows: dict[int, int]
    checkpointed: dict[int, int]
    exact: dict[str, int]


def memory(digits: Digits, seed: int) -> Memory:
    """What `memory_plan` says of the network."""
    plan = memory_plan(Network(seed), (digits.images[:ROWS],), blocks="blocks")
    found = Memory({}, {}, {})
    for option in plan.options:
        entry = option.entry
        if isinstance(entry, Horizon) and entry.when == "forward":
            (found.checkpointed if entry.checkpoint else found.windows)[entry.horizon] = option.bytes
        elif entry is None:
            found.windows[BLOCKS] = found.exact["ordinary tape"] = option.bytes
        elif isinstance(entry, Checkpoint):
            least = min(option.bytes, found.exact.get("checkpointing", option.bytes))
            found.exact["checkpointing"] = least
    return found


def draw(trainings: Sequence[Training], memory: Memory, path: Path) -> Path:
    """Memory against the horizon, and the loss of the batches, averaged over 10, against steps."""
    figure, ((kept, learning),) = new_figure(10, 3.8, columns=2)
    for label, found in (("horizon", memory.windows), ("and checkpointing", memory.checkpointed)):
        sizes = sorted(found)
        kept.plot(sizes, [found[size] / MIB for size in sizes], "o-", label=label)
    kept.axhline(memory.exact["checkpointing"] / MIB, color="grey", linestyle="--", label="checkpointing alone, exact")
    kept.set(xlabel="blocks in a window", ylabel="MiB at the peak of a step, predicted", ylim=(0, None))
    for training in trainings:
        window = min(10, len(training.losses))
        smooth = F.avg_pool1d(torch.tensor(training.losses)[None, None], window, 1)[0, 0].tolist()
        learning.plot(range(window, len(training.losses) + 1), smooth, label=training.name)
    learning.set(xlabel="steps", ylabel="cross entropy of the batches", yscale="log")
    for axis in (kept, learning):
        axis.grid(alpha=0.25)
        axis.legend()
    figure.savefig(path, dpi=120)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Train with three horizons, write horizon.png. Returns the exit status."""
    options = chosen(arguments, str(__doc__).splitlines()[0], "horizon", ("sklearn", "matplotlib"))
    with one_thread():
        digits = Digits.load(options.seed)
        plan = memory_plan(Network(options.seed), (digits.images[:ROWS],), blocks="blocks")
        progress(str(plan))
        steps = 20 if options.quick else 150
        trainings = [train(digits, horizon, options.seed, steps) for horizon in HORIZONS]
        path = draw(trainings, memory(digits, options.seed), options.folder / "horizon.png")
        progress(f"Figure: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
