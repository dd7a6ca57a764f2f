"""What likelihood-ratio cuts cost and keep, beside back-propagation: chains, a frozen tail, a box.

    python benchmarks/ulr_cost.py

One thread. Contestants alternate; best CPU time of several steps of each. Memory is the peak of all live storages that
a step makes (gradients counted; parameters and inputs not).
"""

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from rewriter import BlackBox, CallableBox, UlrCut, rewrite

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from live_memory import LiveMemory

CLASSES = 4


class Loop(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.cell, self.head, self.width = nn.GRUCell(16, width), nn.Linear(width, CLASSES), width

    def forward(self, x):
        h = x.new_zeros(x.shape[0], self.width)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)


class Fused(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.cell, self.head = nn.GRU(16, width, batch_first=True), nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(self.cell(x)[1][0])


class Tail(nn.Module):
    """A small trained encoder in front of a deep tail; frozen, or computed outside the tape."""

    def __init__(self, boxed):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(32, 16), nn.Tanh())
        tail = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), *(Layer(256) for _ in range(16)), nn.Linear(256, CLASSES))
        tail.requires_grad_(False)
        self.tail = CallableBox(lambda z: tail(torch.from_numpy(z).float()).numpy()) if boxed else tail

    def forward(self, x):
        return self.tail(self.encoder(x))


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.relu(self.linear(x))


def made(model, plan, x, y):
    torch.manual_seed(0)
    net = model()
    step = rewrite(net, plan, loss=F.cross_entropy, example=(x,))
    return net, lambda: step(x, target=y)


def timed(net, call):
    start = time.process_time()
    call().backward()
    end = time.process_time()
    net.zero_grad()
    return 1e3 * (end - start)


def table(title, model, plans, x, rounds=12):
    """plans: by name; the first is the measure."""
    y = torch.randint(0, CLASSES, (len(x),))
    contestants = {name: made(model, plan, x, y) for name, plan in plans.items()}
    for each in contestants.values():
        for _ in range(3):
            timed(*each)
    best = dict.fromkeys(plans, float("inf"))
    for _ in range(rounds):
        for name, each in contestants.items():
            best[name] = min(best[name], timed(*each))
    peaks = {}
    for name, (_, call) in contestants.items():
        with LiveMemory() as memory:
            call().backward()
            peaks[name] = memory.peak / 2**20
    net = contestants[next(iter(plans))][0]
    with torch.no_grad():
        floor = min(1e3 * clocked(net, x) for _ in range(rounds))
    print(f"\n{title}; a forward alone takes {floor:.1f} ms\n")
    first = next(iter(plans))
    for name in plans:
        time_ratio, memory_ratio = best[name] / best[first], peaks[name] / peaks[first]
        print(
            f"    {name:<34}{best[name]:8.1f} ms {time_ratio:6.2f} x {peaks[name]:8.2f} MiB {memory_ratio:5.2f} x",
            flush=True,
        )


def clocked(net, x):
    start = time.process_time()
    net(x)
    return time.process_time() - start


def chain(every, rows, copies):
    return {
        "back-propagation": [],
        **{f"every {e}, {n} copies": [UlrCut("cell", every=e, copies=n)] for e in every for n in copies},
        f"every {every[-1]}, {copies[0]} copies, one by one": [
            UlrCut("cell", every=every[-1], copies=copies[0], at_once=1, max_rows=max(64, rows))
        ],
    }


def main():
    torch.set_num_threads(1)
    for model, name in ((Loop, "GRUCell in a loop"), (Fused, "nn.GRU")):
        for width, rows, length in ((32, 16, 128), (128, 64, 128)):
            title = f"{name}, {length} steps, width {width}, {rows} rows"
            plans = chain((8, 32), rows, (2, 8))
            table(title, lambda m=model, w=width: m(w), plans, torch.randn(rows, length, 16))
    x = torch.randn(64, 32)
    plans = {"back-propagation": []} | {f"{n} copies": [UlrCut("encoder", copies=n)] for n in (2, 8, 32)}
    plans["32 copies, 64 rows at a time"] = [UlrCut("encoder", copies=32, max_rows=64)]
    table("Frozen tail of 16 layers of 256, 64 rows, width 16 at the cut", lambda: Tail(False), plans, x)
    plans = {f"BlackBox, {q} probes": [BlackBox("tail", probes=q)] for q in (4, 16)}
    plans |= {f"{n} copies": [UlrCut("encoder", copies=n)] for n in (4, 16)}
    table("The same tail as a box (nothing to differentiate)", lambda: Tail(True), plans, x)


if __name__ == "__main__":
    main()
