"""How long the structure analysis takes, and what it finds: CPU time of one thread, best of three.

    python benchmarks/structure.py

Captured models first, then graphs of one shape in growing size, to see that the time is in proportion to it.
"""

import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from nets import Basic, ResNet, Transformer
from structures import graph_program, program_of

from rewriter.passes.structure import analyse


class Deep(ResNet):
    """ResNet-110 on small images: three stages of 18 blocks."""

    def __init__(self):
        super().__init__(Basic)
        widths = [(8, 8, 1)] * 18 + [(8, 16, 2)] + [(16, 16, 1)] * 17 + [(16, 32, 2)] + [(32, 32, 1)] * 17
        self.layer1 = nn.Sequential(*(Basic(*each) for each in widths))
        self.layer2, self.fc = nn.Sequential(), nn.Linear(32, 5)


class Cell(nn.Module):
    """A gated recurrent unit in its single operations."""

    def __init__(self, width=8):
        super().__init__()
        self.inputs, self.state = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        (a, b, c), (d, e, f) = self.inputs(x).chunk(3, -1), self.state(h).chunk(3, -1)
        keep = torch.sigmoid(b + e)
        return (1 - keep) * torch.tanh(c + torch.sigmoid(a + d) * f) + keep * h


class Loop(nn.Module):
    def __init__(self, cell: nn.Module, every: bool):
        super().__init__()
        self.cell, self.every = cell, every

    def forward(self, x: Tensor) -> Tensor:
        h, states = x.new_zeros(x.shape[0], 8), []
        for t in range(256):
            h = self.cell(x[:, t], h)
            states.append(h)
        return torch.stack(states, 1) if self.every else h


def models():
    tokens, images, series = torch.randint(0, 20, (2, 8)), torch.randn(2, 3, 16, 16), torch.randn(2, 256, 8)
    yield "transformer, 24 layers", Transformer(24), tokens, "fx"
    yield "the same", Transformer(24), tokens, "export"
    yield "ResNet-110", Deep(), images, "fx"
    yield "GRUCell, 256 steps, last state", Loop(nn.GRUCell(8, 8), every=False), series, "fx"
    yield "GRUCell, 256 steps, every state", Loop(nn.GRUCell(8, 8), every=True), series, "fx"
    yield "GRU by hand, 256 steps, last state", Loop(Cell(), every=False), series, "fx"
    yield "GRU by hand, 256 steps, every state", Loop(Cell(), every=True), series, "fx"


def residual(count):
    def build(x, f, add, cat):
        for _ in range(count // 3):
            x = add(x, f(f(x)))
        return x

    return build


def halfway_back(count):
    def build(x, f, add, cat):
        values = [x]
        for number in range(count // 2):
            values.append(add(f(values[-1]), values[number // 2]))
        return values[-1]

    return build


def ladder(count):
    def build(x, f, add, cat):
        kept = []
        for _ in range(count // 3):
            x = f(x)
            kept.append(x)
        for _ in range(count // 3):
            x = f(add(x, kept.pop()))
        return x

    return build


def graphs():
    for shape in (residual, halfway_back, ladder):
        for count in (2_500, 5_000, 10_000, 20_000):
            yield shape.__name__.replace("_", " "), graph_program(shape(count))


def row(name, program):
    times = []
    for _ in range(3):
        start = time.process_time()
        structure = analyse(program)
        times.append(time.process_time() - start)
    chains = ", ".join(str(len(chain.residual)) for chain in structure.chains) or "none"
    steps = ", ".join(str(each.steps) for each in structure.recurrences) or "none"
    count, best = len(program.graph.nodes), min(times)
    print(
        f"| {name} | {count:,} | {1e3 * best:,.0f} | {1e6 * best / count:.0f} "
        f"| {len(structure.cuts):,} | {chains} | {steps} |"
    )


def main():
    torch.set_num_threads(1)
    print("| graph | nodes | ms | us a node | cuts | residual segments | steps |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, model, example, front_end in models():
        row(f"{name} ({front_end})", program_of(model, example, front_end=front_end))
    for name, program in graphs():
        row(name, program)


if __name__ == "__main__":
    main()
