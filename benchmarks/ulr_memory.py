"""Evidence 40 steps back, learnt across cuts: `UlrCut("cell", every=5)` beside back-propagation, whole and truncated.

    python benchmarks/ulr_memory.py [steps]

A tanh RNN sees its class at the first of 40 steps and nothing afterwards. Accuracy on 1,000 unseen sequences, three
seeds, and seconds of one training each on one thread.
"""

import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter import UlrCut, rewrite

LENGTH, WIDTH, CLASSES, ROWS = 40, 32, 10, 64


class Memory(nn.Module):
    """truncated: steps after which the state is detached; None: never."""

    def __init__(self, truncated: int | None = None) -> None:
        super().__init__()
        self.cell, self.head, self.truncated = nn.RNNCell(CLASSES + 2, WIDTH), nn.Linear(WIDTH, CLASSES), truncated
        nn.init.orthogonal_(self.cell.weight_hh)
        with torch.no_grad():
            self.cell.weight_hh *= 0.98
            self.cell.bias_ih.zero_()
            self.cell.bias_hh.zero_()

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], WIDTH)
        for t in range(LENGTH):
            if self.truncated is not None and t % self.truncated == 0:
                h = h.detach()
            h = self.cell(x[:, t], h)
        return self.head(h)


def batch(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    y = torch.randint(0, CLASSES, (rows,), generator=generator)
    x = torch.zeros(rows, LENGTH, CLASSES + 2)
    x[:, 0] = 0.1 * torch.randn(rows, CLASSES + 2, generator=generator)
    x[:, 0, :CLASSES] += F.one_hot(y, CLASSES)
    return x, y


def trained(seed: int, steps: int, truncated: int | None, plan: list[UlrCut]) -> tuple[float, float]:
    """Accuracy and seconds."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = Memory(truncated)
    step = rewrite(net, plan, loss=F.cross_entropy, example=(batch(ROWS, generator)[0],))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    start = time.perf_counter()
    for _ in range(steps):
        x, y = batch(ROWS, generator)
        loss = step(x, target=y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    x, y = batch(1000, generator)
    with torch.no_grad():
        return float((net(x).argmax(1) == y).float().mean()), seconds


def main() -> None:
    torch.set_num_threads(1)
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    methods: dict[str, tuple[int | None, list[UlrCut]]] = {
        "back-propagation": (None, []),
        "truncated to 5 steps": (5, []),
        "cut every 5, 8 copies": (None, [UlrCut("cell", every=5, copies=8)]),
    }
    print(f"| {steps} steps | seed 0 | seed 1 | seed 2 | seconds |\n| --- | --- | --- | --- | --- |")
    for name, (truncated, plan) in methods.items():
        found = [trained(seed, steps, truncated, plan) for seed in range(3)]
        shown = " | ".join(f"{accuracy:.3f}" for accuracy, _ in found)
        print(f"| {name} | {shown} | {sum(s for _, s in found) / 3:.1f} |", flush=True)


if __name__ == "__main__":
    main()
