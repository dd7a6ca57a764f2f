"""What horizons and checkpointing keep and cost: boundaries, live memory, CPU time, and the gradient's direction.

    python benchmarks/horizon.py             # boundaries, then the table
    python benchmarks/horizon.py boundaries  # the first only

One thread. Contestants alternate, the best of several of each. Memory is every storage that operations made and that is
alive, at its most: without parameters, optimizer state and inputs, with gradients and the stash.
"""

import platform
import sys
import time
from pathlib import Path

import torch
from torch import nn

from rewriter import Checkpoint, Horizon, Plan, memory_plan, rewrite

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from live_memory import LiveMemory

BLOCKS, WIDTH, TOKENS, WORDS = 24, 96, 512, 64
X = torch.randint(0, WORDS, (TOKENS // 32, 32))
Y = torch.randint(0, WORDS, (TOKENS // 32, 32))


class Unit(nn.Module):
    """A pre-norm block of two layers, or of attention."""

    def __init__(self, attention):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True) if attention else None
        layers = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        self.layers = None if attention else nn.Sequential(*layers)

    def forward(self, x):
        y = self.norm(x)
        if self.layers is not None:
            return x + self.layers(y)
        return x + self.attention(y, y, y, need_weights=False)[0]


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)
        self.blocks = nn.ModuleList([Unit(number % 2 == 0) for number in range(BLOCKS)])

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss(output, target):
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def made(entry):
    """A step that is called with the target, and its model."""
    model = Transformer()
    if entry is None:
        return model, lambda: loss(model(X), Y)
    step = rewrite(model, Plan([entry]), loss=loss, example=(X,))
    return model, lambda: step(X, target=Y)


def timed(model, call):
    start = time.process_time()
    call().backward()
    end = time.process_time()
    model.zero_grad()
    return 1e3 * (end - start)


def race(entries, rounds):
    """Best ms of CPU time of a step, by name."""
    contestants = {name: made(entry) for name, entry in entries.items()}
    for model, call in contestants.values():
        timed(model, call)
    found = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, (model, call) in contestants.items():
            found[name].append(timed(model, call))
    return {name: min(times) for name, times in found.items()}


def peak(entry):
    model, call = made(entry)
    timed(model, call)
    with LiveMemory() as memory:
        call().backward()
        return memory.peak


def gradient(entry):
    model, call = made(entry)
    found = torch.autograd.grad(call(), list(model.blocks.parameters()))
    return torch.cat([each.flatten() for each in found])


def boundaries():
    never = Horizon("blocks", BLOCKS, tape="never")
    best = race({"eager": None, "all blocks": never, "left on the tape": Horizon("blocks", BLOCKS)}, 25)
    for name, found in best.items():
        print(f"{name:<18}{found:8.2f} ms  {found / best['eager']:6.3f} x eager")


def table():
    entries = {"eager": None}
    entries |= {f"checkpoint {every}": Checkpoint("blocks", every) for every in (1, 2, 5)}
    for horizon in (1, 2, 4, 6, 12):
        entries[f"h={horizon}"] = Horizon("blocks", horizon)
        if horizon in (6, 12):
            entries[f"h={horizon}, stride {horizon // 2}"] = Horizon("blocks", horizon, stride=horizon // 2)
            entries[f"h={horizon}, stride 1"] = Horizon("blocks", horizon, stride=1)
            entries[f"h={horizon}, backward"] = Horizon("blocks", horizon, when="backward")
            entries[f"h={horizon}, checkpointed"] = Horizon("blocks", horizon, checkpoint=True)
    times, exact, eager = race(entries, 4), gradient(None), peak(None)
    print(f"{'':<20}{'MiB':>8}{'of eager':>10}{'ms':>9}{'of eager':>10}{'cosine':>9}")
    for name, entry in entries.items():
        most, own = peak(entry), gradient(entry)
        cosine = float(own @ exact / own.norm() / exact.norm())
        spent = times[name]
        ratio = spent / times["eager"]
        print(f"{name:<20}{most / 2**20:>8.2f}{most / eager:>10.2f}{spent:>9.1f}{ratio:>10.2f}{cosine:>9.3f}")
    print()
    print(memory_plan(Transformer(), (X,), int(0.3 * eager)))


def main():
    torch.set_num_threads(1)
    print(f"{platform.python_implementation()} {platform.python_version()}, torch {torch.__version__}, one thread")
    boundaries()
    if "boundaries" not in sys.argv[1:]:
        table()


if __name__ == "__main__":
    main()
