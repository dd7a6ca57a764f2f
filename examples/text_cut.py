"""Tell which documentation a passage is from, with a GRU cut into four sub-chains, and with truncated back-propagation.

Passages of 40 words come from the reference of Python and the docstrings of NumPy and of PyTorch, as they are installed
here. `UlrCut(every=10)` ends the tape after every ten words, as truncation does, and estimates what truncation drops:
the gradient at the states that are handed on, from losses of noisy copies that run forward only. In the first task all
words tell the source; in the second only the first ten do, and words of matplotlib's docstrings follow, so that all
that decides lies before the first cut. All runs of a task start from the same weights and see the same batches.

    python -m rewriter.examples.text_cut
"""

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter import Plan, UlrCut, rewrite
from rewriter.examples.command import chosen, new_figure, progress
from rewriter.examples.random_forest import one_thread
from rewriter.rewritten import Rewritten

SOURCES, FOLLOWING = ("Python", "NumPy", "PyTorch"), "matplotlib"
LENGTH, ROWS, WORDS, WIDTH = 40, 32, 2000, 32
RATE, COPIES = 2e-2, 8  # Adam's rate and the copies were chosen on other seeds
REMEMBERS = 3.0  # first bias of the GRU's update gate, for all methods: nothing learns the second task from zero
METHODS = ("back-propagation", "truncated", "UlrCut")
TASKS = {"all words tell": LENGTH, "the first quarter tells": LENGTH // 4}
POINTS = 8  # of a curve


def docstrings(*holders: object) -> list[str]:
    """Those of what modules hold and of what classes in them hold, each once."""
    found: dict[str, None] = {}
    for holder in holders:
        for name, held in sorted(vars(holder).items()):
            inner = vars(held) if isinstance(held, type) else {}
            for each in [held, *(inner[key] for key in sorted(inner))] if not name.startswith("_") else []:
                text = getattr(each, "__doc__", None)
                if isinstance(text, str) and len(text) > 200:
                    found[text] = None
    return list(found)


@dataclass(frozen=True)
class Texts:
    """Numbers of words by source; the WORDS - 1 most frequent words have their own, others are 0."""

    seen: Mapping[str, Tensor]
    unseen: Mapping[str, Tensor]

    @classmethod
    def installed(cls) -> "Texts":
        """Every fifth topic or docstring is kept for testing; some resemble others that are trained on."""
        from pydoc_data.topics import topics

        import numpy as np
        from matplotlib import artist, axes, figure

        texts = {
            "Python": list(topics.values()),
            "NumPy": docstrings(np, np.linalg, np.fft, np.random),
            "PyTorch": docstrings(torch, nn, F, torch.linalg, torch.optim, torch.distributions),
            FOLLOWING: docstrings(artist, axes, figure),
        }
        words = {name: [re.findall(r"[a-z_]+", text.lower()) for text in found] for name, found in texts.items()}
        unseen = {name: [word for text in found[::5] for word in text] for name, found in words.items()}
        seen = {
            name: [word for place, text in enumerate(found) if place % 5 for word in text]
            for name, found in words.items()
        }
        counts = Counter(word for found in seen.values() for word in found)
        numbers = {word: number for number, (word, _) in enumerate(counts.most_common(WORDS - 1), 1)}

        def numbered(part: dict[str, list[str]]) -> dict[str, Tensor]:
            return {name: torch.tensor([numbers.get(word, 0) for word in found]) for name, found in part.items()}

        return cls(numbered(seen), numbered(unseen))


def passages(texts: Mapping[str, Tensor], telling: int, rows: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Passages (rows, LENGTH), whose first `telling` words are from the source (rows,), without end."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(name: str) -> Tensor:
        starts = torch.randint(len(texts[name]) - LENGTH, (rows, 1), generator=generator)
        return texts[name][starts + torch.arange(LENGTH)]

    while True:
        sources = torch.randint(len(SOURCES), (rows,), generator=generator)
        words = torch.stack([drawn(name) for name in SOURCES])[sources, torch.arange(rows)]
        words[:, telling:] = drawn(FOLLOWING)[:, telling:]
        yield words, sources


class Reader(nn.Module):
    """Words (rows, LENGTH) -> scores of the sources, from the last state; truncate: detach the state so often."""

    def __init__(self, seed: int, truncate: int | None = None) -> None:
        super().__init__()
        self.truncate = truncate
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.words, self.rnn = nn.Embedding(WORDS, 16), nn.GRU(16, WIDTH, batch_first=True)
            self.head = nn.Linear(WIDTH, len(SOURCES))
        nn.init.constant_(self.rnn.get_parameter("bias_ih_l0")[WIDTH : 2 * WIDTH], REMEMBERS)

    def forward(self, words: Tensor) -> Tensor:
        read = self.words(words)
        if self.truncate is None:
            _, state = self.rnn(read)
        else:
            first, *rest = read.split(self.truncate, 1)
            _, state = self.rnn(first)
            for part in rest:
                _, state = self.rnn(part, state.detach())
        scores: Tensor = self.head(state[0])
        return scores


@dataclass
class Curve:
    """One run: accuracy on passages never trained on after so many steps; seconds: of training; copies: rows evaluated
    forward only in a step, beside the batch's own."""

    task: str
    method: str
    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    seconds: float = 0.0
    copies: int = 0


def cut(reader: Reader, example: Tensor, seed: int) -> Rewritten:
    """The reader with its GRU in four sub-chains, called with (words, target=sources)."""
    plan = Plan([UlrCut("rnn", every=LENGTH // 4, copies=COPIES)])
    return rewrite(reader, plan, loss=F.cross_entropy, example=(example,), seed=seed)


def train(task: str, method: str, texts: Texts, seed: int, steps: int) -> Curve:
    """Adam for `steps` batches; the seed decides weights, batches and noise."""
    curve = Curve(task, method)
    reader = Reader(seed, LENGTH // 4 if method == "truncated" else None)
    batches = passages(texts.seen, TASKS[task], ROWS, seed)
    unseen, truth = next(passages(texts.unseen, TASKS[task], 1000, seed))
    step = cut(reader, unseen[:ROWS], seed) if method == "UlrCut" else None
    optimizer = torch.optim.Adam(reader.parameters(), RATE)
    for number in range(1, steps + 1):
        words, sources = next(batches)
        start = time.perf_counter()
        loss = F.cross_entropy(reader(words), sources) if step is None else step(words, target=sources)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        curve.seconds += time.perf_counter() - start
        if number % max(1, steps // POINTS) == 0:
            with torch.no_grad():
                found = float((reader(unseen).argmax(1) == truth).float().mean())
            curve.steps.append(number)
            curve.accuracy.append(found)
    curve.copies = 0 if step is None else step.ledger.total("probes") // steps
    progress(f"{task:<26}{method:<18}{curve.accuracy[-1]:>9.3f}{1000 * curve.seconds / steps:>9.0f}{curve.copies:>9,}")
    return curve


def draw(curves: Sequence[Curve], path: Path) -> Path:
    """Accuracy against steps, one panel for each task."""
    figure, (panels,) = new_figure(10, 3.8, columns=len(TASKS))
    for axis, task in zip(panels, TASKS, strict=True):
        for curve, style in zip([each for each in curves if each.task == task], ("o-", "s--", "^-"), strict=True):
            axis.plot([0, *curve.steps], [1 / len(SOURCES), *curve.accuracy], style, label=curve.method, markersize=4)
        axis.axhline(1 / len(SOURCES), color="grey", linewidth=1, linestyle=":", label="chance")
        axis.set(xlabel="steps", ylabel="accuracy on unseen passages", title=task, ylim=(0.2, 1))
        axis.grid(alpha=0.25)
    panels[0].legend(loc="lower right")
    figure.savefig(path, dpi=120)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Train three ways on both tasks, write text_cut.png. Returns the exit status."""
    options = chosen(arguments, str(__doc__).splitlines()[0], "text_cut", ("matplotlib",))
    with one_thread():
        texts = Texts.installed()
        progress(f"{'task':<26}{'gradient':<18}{'accuracy':>9}{'ms/step':>9}{'copies':>9}")
        steps = 8 if options.quick else 200
        curves = [train(task, method, texts, options.seed, steps) for task in TASKS for method in METHODS]
    progress("Here back-propagation is exact and cheaper: cut where the whole sequence's tape does not fit.")
    progress(f"Figure: {draw(curves, options.folder / 'text_cut.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
