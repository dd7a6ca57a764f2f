"""What two worker processes give, beside the most that two processes can give on this machine.

    python benchmarks/workers.py [--write]

One row is a loop of pure Python of about 1 ms. Ceiling: two bare processes that run the same loop side by side, started
before the clock, their rates added. Box: `CallableBox(..., per_row=True, executor="processes:2")`, warm. Both alternate
in one run. The ratio is that of the best time of each, as whatever else runs on the machine only ever adds to them; the
ratios within single repetitions are beside it. Overhead: the share of the two workers' time between sending the first
block and receiving the last that they did not spend inside a block, the median of all.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from rewriter import CallableBox

ROWS, REPETITIONS = 1000, 11
RESULTS = Path(__file__).parent / "results" / "workers.md"


class Loop:
    """One row: a number that takes `count` turns of a Python loop."""

    def __init__(self, count):
        self.count = count

    def __call__(self, x):
        value = float(x)
        for _ in range(self.count):
            value = value * 1.000001 + 1e-9
        return value


def turns_per_millisecond():
    """Best of several, in this process."""
    times = []
    for _ in range(20):
        began = time.perf_counter()
        Loop(10_000)(0.5)
        times.append(time.perf_counter() - began)
    return round(10_000 * 1e-3 / min(times))


def bare(loop, rows, begin, end, times, number):
    """The worker of the ceiling: `rows` rows each time the parent says so."""
    while True:
        begin.wait()
        began = time.perf_counter()
        for row in range(rows):
            loop(row)
        times[number] = time.perf_counter() - began
        end.wait()


class Ceiling:
    """Two processes without anything between them but a barrier before and after."""

    def __init__(self, loop):
        context = multiprocessing.get_context("spawn")
        self.begin, self.end, self.times = context.Barrier(3), context.Barrier(3), context.RawArray("d", 2)
        for number in range(2):
            arguments = loop, ROWS // 2, self.begin, self.end, self.times, number
            context.Process(target=bare, args=arguments, daemon=True).start()

    def seconds(self):
        """What all rows take at the rates of the two together, so that none waits for the slower one."""
        self.begin.wait()
        self.end.wait()
        return ROWS / sum(ROWS // 2 / seconds for seconds in self.times)


def measure(loop):
    """Seconds of the ceiling and of the box, overhead and blocks, per repetition; whether 1 and 2 workers agree."""
    x = torch.rand(ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    box, one = (CallableBox(loop, per_row=True, executor=f"processes:{count}") for count in (2, 1))
    ceiling = Ceiling(loop)
    equal = np.array_equal(box.evaluate(x)[0], one.evaluate(x)[0])
    ceiling.seconds()
    found = []
    for _ in range(REPETITIONS):
        bound = ceiling.seconds()
        began = time.perf_counter()
        answers = box._workers.evaluate([x.numpy()], ROWS, (((), np.dtype(float)),))
        taken = time.perf_counter() - began
        inside = sum(answer.seconds for answer in answers)
        found.append((bound, taken, 1 - inside / (2 * taken), len(answers)))
    return found, equal


def report(loop, found, equal):
    """What is printed."""
    bound, taken = min(bound for bound, *_ in found), min(taken for _, taken, *_ in found)
    lines = [
        f"{os.cpu_count()} CPU cores, Python {platform.python_version()}; load of the machine in the last minute "
        f"{os.getloadavg()[0]:.1f}, of which this run itself makes 2",
        f"{ROWS} rows of {loop.count} turns (about 1 ms), {REPETITIONS} repetitions",
        f"ceiling: {bound * 1e3:.0f} ms at best by two bare processes",
        f"box:     {taken * 1e3:.0f} ms at best on processes:2",
    ]
    ratios = sorted(bound / taken for bound, taken, *_ in found)
    overheads = sorted(overhead for *_, overhead, _ in found)
    blocks = statistics.median(count for *_, count in found)
    lines += [
        f"box / ceiling: {bound / taken:.3f} (goal .85); within a repetition {statistics.median(ratios):.3f} in the "
        f"median, from {ratios[0]:.3f} to {ratios[-1]:.3f}",
        f"overhead: {statistics.median(overheads):.1%} (from {overheads[0]:.1%} to {overheads[-1]:.1%}; goal < 5 %), "
        f"{blocks:g} blocks",
        f"bit-equal for 1 and 2 workers: {equal}",
    ]
    return "\n".join(lines)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--write", action="store_true", help="into benchmarks/results/workers.md")
    write = arguments.parse_args().write
    loop = Loop(turns_per_millisecond())
    text = report(loop, *measure(loop))
    print(text)
    if write:
        RESULTS.write_text(
            f"# Workers\n\n`python benchmarks/workers.py --write`\n\n    {text.replace(chr(10), chr(10) + '    ')}\n"
        )


if __name__ == "__main__":
    sys.exit(main())
