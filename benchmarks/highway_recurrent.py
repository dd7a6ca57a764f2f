"""Highway-BP through time against autograd, torch's kernels and the exact backward with deferred weight gradients.

    python benchmarks/highway_recurrent.py

CPU time, one thread. Every row alternates its contestants and takes the best of five of each. `k=...` is the model
under `Highway(..., iterations=k, tape="never")`; the others, models and sequences are those of `recurrence.py`. Cosines
are between the gradients of all weights and the exact ones, with a cotangent at every step; fixed point is `shift=1`,
which is truncated back-propagation.
"""

import platform

import torch
from recurrence import Loop, Normed, OwnGRU, Whole, given, race
from torch import nn

from rewriter import Deferred, Highway, Plan, rewrite

COUNTS = (0, 1, 2, 3, 5)


def under(model, iterations, shift=0.0):
    return rewrite(model, Plan([Highway("cell", iterations=iterations, shift=shift, tape="never")]))


def whole(kind, size, counts, loop=True):
    torch.manual_seed(1)
    module = Whole(kind, size, size)
    cell = {nn.GRU: nn.GRUCell, nn.LSTM: nn.LSTMCell, nn.RNN: nn.RNNCell}[kind](size, size)
    contestants = {"loop": Loop(cell, kind is nn.LSTM)} if loop else {}
    return {**contestants, "torch": module, **_rewritten(module, counts)}


def looped(cell, size, counts):
    torch.manual_seed(1)
    model = Loop(cell(size, size))
    return {"loop": model, **_rewritten(model, counts)}


def _rewritten(model, counts):
    exact = {"deferred": rewrite(model, Plan([Deferred("cell", tape="never")]))}
    return exact | {f"k={count}": under(model, count) for count in counts}


def row(name, contestants, sizes, part=0):
    """part: 0 for the backward, 1 for the whole step."""
    times = {each: pair[part] for each, pair in race(contestants, given(*sizes)).items()}
    exact = min(times[each] for each in ("loop", "torch", "deferred") if each in times)
    cells = [f"{times[each]:.1f}" if each in times else "" for each in ("loop", "torch", "deferred")]
    for count in COUNTS:
        found = times.get(f"k={count}")
        cells.append("" if found is None else f"{found:.1f} ({exact / found:.2f})")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return times


def header(title):
    print(f"\n{title}\n")
    print("| | loop | torch | deferred | " + " | ".join(f"k={count}" for count in COUNTS) + " |")
    print("| --- |" + " --- |" * (3 + len(COUNTS)))


def goal(name, found, wanted):
    print(f"- {name}: {found:.2f} (goal {wanted}){'' if found >= wanted else ' **missed**'}")


def cosines(sizes, gate):
    """Rows of cosines over `COUNTS`, for Highway-BP and for the fixed point. gate: added to the update gate's bias."""
    steps, rows, size = sizes
    torch.manual_seed(1)
    module = Whole(nn.GRU, size, size)
    with torch.no_grad():
        module.cell.bias_ih_l0[size : 2 * size] += gate
    x, h, cotangent = given(steps, rows, size)
    weights = list(module.parameters())

    def gradient(model):
        return torch.cat([each.flatten() for each in torch.autograd.grad(model(x, h), weights, cotangent)]).double()

    exact = gradient(module)
    for name, shift in (("Highway", 0.0), ("fixed point", 1.0)):
        found = [gradient(under(module, count, shift)) for count in COUNTS]
        shown = [f"{float(each @ exact / each.norm() / exact.norm()):.4f}" for each in found]
        z = float(torch.sigmoid(torch.tensor(gate)))
        print(f"| {name}, z about {z:.2f} | {' | '.join(shown)} |", flush=True)


def main():
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread, best of 5.")
    header("Backward, ms; in brackets how many times as fast as the fastest exact one, below 1 where it loses:")
    small, large = (1024, 4, 64), (256, 32, 256)
    first = row("nn.GRU T=1024 B=4 H=64", whole(nn.GRU, 64, COUNTS), small)
    row("nn.RNN T=1024 B=4 H=64", whole(nn.RNN, 64, COUNTS), small)
    row("nn.LSTM T=1024 B=4 H=64", whole(nn.LSTM, 64, COUNTS), small)
    row("own cell, GRU's gates, T=256 B=4 H=64", looped(OwnGRU, 64, COUNTS), (256, 4, 64))
    row("own cell, layer norm, T=256 B=4 H=64", looped(Normed, 64, COUNTS), (256, 4, 64))
    row("nn.GRU T=256 B=1 H=256", whole(nn.GRU, 256, COUNTS), (256, 1, 256))
    row("nn.GRU T=1024 B=32 H=64", whole(nn.GRU, 64, COUNTS), (1024, 32, 64))
    row("nn.GRU T=256 B=32 H=256", whole(nn.GRU, 256, COUNTS), large)
    header("Whole step, ms:")
    step = row("nn.GRU T=96 B=4 H=64", whole(nn.GRU, 64, COUNTS), (96, 4, 64), part=1)
    row("nn.GRU T=1024 B=4 H=64", whole(nn.GRU, 64, COUNTS), small, part=1)
    row("nn.GRU T=256 B=32 H=256", whole(nn.GRU, 256, COUNTS), large, part=1)
    print("\nGoals, as ratios of times with k=1:\n")
    goal("backward, autograd's loop at T=1024 B=4 H=64", first["loop"] / first["k=1"], 4)
    goal("backward, nn.GRU there", first["torch"] / first["k=1"], 4)
    goal("backward, deferred there", first["deferred"] / first["k=1"], 1.2)
    goal("whole step, nn.GRU at T=96 B=4 H=64", step["torch"] / step["k=1"], 1.3)
    print("\nCosine with the exact gradient, nn.GRU T=256 B=32 H=256:\n")
    print("| | " + " | ".join(f"k={count}" for count in COUNTS) + " |")
    print("| --- |" + " --- |" * len(COUNTS))
    cosines(large, 0.0)
    cosines(large, 4.0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
