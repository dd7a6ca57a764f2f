"""What deferring weight gradients saves in recurrent networks: backward and whole-step CPU times.

    python benchmarks/recurrence.py            # the table
    python benchmarks/recurrence.py goals      # its rows with goals, and the two that are reported beside them
    python benchmarks/recurrence.py sizes      # where the planner draws its lines

One thread. Every row alternates its contestants and takes the best of five of each. `loop` is the cell in a Python loop
(inputs unbound once) on autograd, `torch` the module of torch.nn, `deferred` the same model under `Deferred(...,
tape="never")`, `planned` under `tape="auto"`. Sequences require gradients, and every step's output has a cotangent.
"""

import platform
import sys
import time

import torch
from torch import nn

from rewriter import Deferred, Plan, rewrite


class OwnGRU(nn.Module):
    """The gates of nn.GRU as a user writes them."""

    def __init__(self, width, size):
        super().__init__()
        self.from_input, self.from_state = nn.Linear(width, 3 * size), nn.Linear(size, 3 * size)

    def forward(self, x, h):
        xr, xz, xn = self.from_input(x).chunk(3, 1)
        hr, hz, hn = self.from_state(h).chunk(3, 1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        n = torch.tanh(xn + r * hn)
        return (1 - z) * n + z * h


class ResetFirst(nn.Module):
    """The first form of the GRU: the reset gate acts before the product, so the loop holds two products."""

    def __init__(self, width, size):
        super().__init__()
        self.gates, self.candidate = nn.Linear(width + size, 2 * size), nn.Linear(width + size, size)

    def forward(self, x, h):
        r, z = torch.sigmoid(self.gates(torch.cat([x, h], 1))).chunk(2, 1)
        n = torch.tanh(self.candidate(torch.cat([x, r * h], 1)))
        return h + z * (n - h)


class Normed(nn.Module):
    """Layer norm inside the cell, which does not collapse to coefficients."""

    def __init__(self, width, size):
        super().__init__()
        self.from_input, self.from_state = nn.Linear(width, size), nn.Linear(size, size)
        self.norm = nn.LayerNorm(size)

    def forward(self, x, h):
        return h + torch.tanh(self.norm(self.from_input(x) + self.from_state(h)))


class Loop(nn.Module):
    def __init__(self, cell, pair=False):
        super().__init__()
        self.cell, self.pair = cell, pair

    def forward(self, x, h):
        inputs, outputs, c = x.unbind(1), [], h
        for step in range(x.shape[1]):
            if self.pair:
                h, c = self.cell(inputs[step], (h, c))
            else:
                h = self.cell(inputs[step], h)
            outputs.append(h)
        return torch.stack(outputs, 1)


class Whole(nn.Module):
    def __init__(self, kind, width, size):
        super().__init__()
        self.cell = kind(width, size, batch_first=True)

    def forward(self, x, h):
        state = (h.unsqueeze(0), h.unsqueeze(0)) if isinstance(self.cell, nn.LSTM) else h.unsqueeze(0)
        output, _ = self.cell(x, state)
        return output


def timed(call, given):
    """(backward, whole step) in ms of CPU time."""
    x, h, cotangent = given
    x = x.detach().requires_grad_()
    start = time.process_time()
    output = call(x, h)
    between = time.process_time()
    output.backward(cotangent)
    end = time.process_time()
    for parameter in call.parameters():
        parameter.grad = None
    return 1e3 * (end - between), 1e3 * (end - start)


def race(contestants, given, rounds=5):
    """Name -> best (backward, whole step)."""
    for call in contestants.values():
        timed(call, given)
    found = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            found[name].append(timed(call, given))
    return {name: tuple(min(each) for each in zip(*times, strict=True)) for name, times in found.items()}


def given(steps, rows, size, dtype=torch.float32):
    torch.manual_seed(0)
    return (
        torch.randn(rows, steps, size, dtype=dtype),
        torch.zeros(rows, size, dtype=dtype),
        torch.randn(rows, steps, size, dtype=dtype) / steps,
    )


def whole(kind, size, dtype=torch.float32):
    """Contestants for a module of torch: its own loop, itself, and both ways of deferring."""
    torch.manual_seed(1)
    module = Whole(kind, size, size).to(dtype)
    cell = {nn.GRU: nn.GRUCell, nn.LSTM: nn.LSTMCell, nn.RNN: nn.RNNCell}[kind](size, size).to(dtype)
    return {
        "loop": Loop(cell, kind is nn.LSTM),
        "torch": module,
        "deferred": rewrite(module, Plan([Deferred("cell", tape="never")])),
        "planned": rewrite(module, Plan([Deferred("cell")])),
    }


def looped(cell, size, pair=False):
    """Contestants for a cell of one's own."""
    torch.manual_seed(1)
    model = Loop(cell(size, size), pair)
    return {
        "loop": model,
        "deferred": rewrite(model, Plan([Deferred("cell", tape="never")])),
        "planned": rewrite(model, Plan([Deferred("cell")])),
    }


def row(name, contestants, sizes, dtype=torch.float32):
    times = race(contestants, given(*sizes, dtype))
    columns = "  ".join(
        f"{n} {times[n][0]:6.1f} / {times[n][1]:6.1f}" if n in times else " " * 22
        for n in ("loop", "torch", "deferred", "planned")
    )
    others = [times[n][0] for n in ("loop", "torch") if n in times]
    ratios = " and ".join(f"{each / times['deferred'][0]:.2f}" for each in others)
    planned = min(others) / times["planned"][0]
    print(f"{name:24} {columns}   backward {ratios} x, planned {planned:.2f} x of the faster", flush=True)


def table():
    print("CPU time in ms, backward / whole step; sizes are steps, rows, width")
    for sizes in ((1024, 4, 64), (256, 1, 256), (1024, 32, 64), (256, 32, 256)):
        print(f"T={sizes[0]} B={sizes[1]} H={sizes[2]}")
        size = sizes[2]
        for kind in (nn.GRU, nn.RNN, nn.LSTM):
            row(f"nn.{kind.__name__}", whole(kind, size), sizes)
        row("nn.LSTM float64", whole(nn.LSTM, size, torch.float64), sizes, torch.float64)
        if sizes == (1024, 32, 64):
            continue
        row("own cell, GRU's gates", looped(OwnGRU, size), sizes)
        row("nn.LSTMCell in a loop", looped(nn.LSTMCell, size, pair=True), sizes)
        row("own cell, reset first", looped(ResetFirst, size), sizes)
        row("own cell, layer norm", looped(Normed, size), sizes)


def goals():
    print("CPU time in ms, backward / whole step; sizes are steps, rows, width")
    small, large = (1024, 4, 64), (256, 32, 256)
    row("nn.GRU 1024, 4, 64", whole(nn.GRU, 64), small)
    row("nn.GRU 256, 32, 256", whole(nn.GRU, 256), large)
    row("nn.LSTM 1024, 4, 64", whole(nn.LSTM, 64), small)
    row("GRU's gates 1024, 4, 64", looped(OwnGRU, 64), small)
    row("reset first 1024, 4, 64", looped(ResetFirst, 64), small)


def errors():
    """Largest relative error of any gradient at T=1024 B=4 H=64, against eager in the same precision."""
    for dtype in (torch.float32, torch.float64):
        contestants = whole(nn.GRU, 64, dtype)
        x, h, cotangent = given(1024, 4, 64, dtype)
        found = []
        for name in ("torch", "deferred"):
            sequence = x.clone().requires_grad_()
            output = contestants[name](sequence, h)
            sources = [sequence, *contestants[name].parameters()]
            found.append(torch.autograd.grad((output * cotangent).sum(), sources))
        worst = max(float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True))
        print(f"nn.GRU, {str(dtype).removeprefix('torch.')}: relative error of the gradients {worst:.1e}")


def sizes():
    """Backward of torch's module or of the loop over that of `deferred`, for sizes on both sides of the lines."""
    for steps in (8, 16, 24, 32, 64, 128):
        row(f"nn.GRU T={steps}", whole(nn.GRU, 64), (steps, 4, 64))
        row(f"own GRU T={steps}", looped(OwnGRU, 64), (steps, 4, 64))
    for rows, size in ((8, 128), (16, 128), (32, 128), (32, 192), (64, 256)):
        row(f"nn.GRU B={rows} H={size}", whole(nn.GRU, size), (128, rows, size))
        row(f"own GRU B={rows} H={size}", looped(OwnGRU, size), (128, rows, size))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread, best of 5")
    if sys.argv[1:] == ["sizes"]:
        sizes()
    elif sys.argv[1:] == ["goals"]:
        goals()
    else:
        errors()
        table()
