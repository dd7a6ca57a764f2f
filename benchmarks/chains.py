"""What Highway's blocks cost, and how much of the gradient its iterations hold.

    python benchmarks/chains.py > benchmarks/results/chains.md

One thread. A pre-norm byte transformer of 24 residual blocks (12 layers, width 128, 256 tokens a batch). Times are CPU
times of whole steps, the smallest of 40 rounds; contestants alternate, and each is also compared with eager's step of
the same round (the median of these ratios). `lowered` asks for an exact number of iterations with tape="auto", which
leaves the blocks on the ordinary tape: the same operations as eager's, so its distance from 1 is the noise of the row.
`explain` is what `explain()` says of the blocks alone, after their last backward.
"""

import platform
import statistics
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from rewriter import Highway, Plan, rewrite
from rewriter.examples.highway import Bytes, batches

ROUNDS = 40
STEPS = (0, 50, 300)
COUNTS = range(6)
SEGMENTS = (None, 8, 4)


def entry(iterations, segments=None, shift=0.0, tape="never"):
    return Highway("units", iterations=iterations, segments=segments, shift=shift, tape=tape)


def made(model, text, *entries):
    return rewrite(model, Plan(entries), loss=nn.CrossEntropyLoss(), example=(text,))


def eager(model, text, target):
    return F.cross_entropy(model(text), target)


def timed(model, loss_of, text, target):
    """(forward, whole step) in ms."""
    start = time.thread_time()
    loss = loss_of(text, target=target)
    middle = time.thread_time()
    loss.backward()
    end = time.thread_time()
    model.zero_grad()
    return 1e3 * (middle - start), 1e3 * (end - start)


def overhead(model, text, target):
    contestants = {
        "eager": partial(eager, model),
        "lowered": made(model, text, entry(23, tape="auto")),
        "k = 0, 24 blocks": made(model, text, entry(0)),
        "k = 0, 4 segments": made(model, text, entry(0, 4)),
        "k = 1, 24 blocks": made(model, text, entry(1)),
        "k = 3, 24 blocks": made(model, text, entry(3)),
        "k = 3, 4 segments (exact)": made(model, text, entry(3, 4)),
    }
    times = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, loss_of in contestants.items():
            times[name].append(timed(model, loss_of, text, target))
    steps = {name: [step for _, step in found] for name, found in times.items()}
    print("| | forward ms | step ms | of eager's | median ratio | explain |\n| --- | --- | --- | --- | --- | --- |")
    for name, found in steps.items():
        regions = contestants[name].latest.emitted.regions if name != "eager" else {}
        said = f"{regions['units'].rule.describe()['cost']:.2f}" if regions else "1"
        forward, ratio = min(each for each, _ in times[name]), min(found) / min(steps["eager"])
        paired = statistics.median(mine / theirs for mine, theirs in zip(found, steps["eager"], strict=True))
        print(f"| {name} | {forward:.1f} | {min(found):.1f} | {ratio:.3f} | {paired:.3f} | {said} |")


def gradient(model, loss):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found, strict=True)]
    return torch.cat([part.flatten() for part in parts]).double()


def cosines(model, text, target):
    exact = gradient(model, eager(model, text, target))
    ways = {f"{segments or 24} units": (segments, 0.0) for segments in SEGMENTS}
    ways |= {"24 units, shift .2": (None, 0.2), "24 units, shift 1 (truncated)": (None, 1.0)}
    for name, (segments, shift) in ways.items():
        step = made(model, text, entry(tuple(enumerate(COUNTS)), segments, shift))  # the next count at every forward
        found = [gradient(model, step(text, target=target)) for _ in COUNTS]
        yield name, [f"{float(F.cosine_similarity(each, exact, dim=0)):.4f}" for each in found]
    auto = made(model, text, entry("auto", 24))
    found = gradient(model, auto(text, target=target))
    facts = auto.latest.emitted.regions["units"].rule.describe()
    apart = float((found - exact).norm() / exact.norm())
    yield f"auto: {facts['count']} iterations, predicted error {facts['error']:.2g}, of the gradient {apart:.2g}", []


def main():
    torch.set_num_threads(1)
    model = Bytes(0, layers=12, width=128, context=64)
    data = batches(0, rows=4, context=64)
    text, target = next(batches(1, rows=4, context=64))
    print(f"# Highway over blocks\n\n`python benchmarks/chains.py`, torch {torch.__version__}, {platform.machine()}.\n")
    print((__doc__ or "").split("\n\n")[2].strip() + "\n")
    overhead(model, text, target)
    print("\n## Cosine of the gradient of all parameters with the exact one\n")
    print("The same model, trained exactly on Python's language reference.\n")
    print("| step | | " + " | ".join(f"k = {count}" for count in COUNTS) + " |\n| --- | --- |" + " --- |" * len(COUNTS))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    notes = []
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            for name, shown in cosines(model, text, target):
                if shown:
                    print(f"| {step} | {name} | " + " | ".join(shown) + " |")
                else:
                    notes.append(f"- step {step}, 24 units, {name}")
        loss = eager(model, *next(data))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print("\n" + "\n".join(notes))
    print(f"\nThe loss ended at {loss.item():.2f} nats per byte.")


if __name__ == "__main__":
    main()
