"""The outputs of a whole batch from the answers of its blocks, rows without an answer masked."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from .protocol import Array, Layout
from .task import Failure, Outcome, in_words

Part = tuple[Sequence[int], list[Array]]


def assemble(answers: Iterable[Outcome], rows: int, known: Layout | None) -> tuple[list[Array], dict[int, Failure]]:
    """Outputs of `rows` rows in the known layout, and the reason for each row that has none.

    Such a row is NaN in floating outputs and 0 in the others. Without a known layout, that of most rows is taken (ties:
    of the earliest); precision is adapted, and integers become floating, as the layout demands. No outputs at all where
    there is neither.
    """
    parts: list[Part] = []
    failures: dict[int, Failure] = {}
    for answer in answers:
        parts += answer.parts
        failures.update(answer.failures)
    parts.sort(key=lambda part: part[0][0])
    layout = known or (_layout(parts) if parts else ())
    if len(parts) == 1 and len(parts[0][0]) == rows and _layout(parts) == layout:
        return parts[0][1], failures
    outputs = [np.full((rows, *shape), np.nan if dtype.kind == "f" else 0, dtype) for shape, dtype in layout]
    for part_rows, found in parts:
        adapted = _adapted(found, layout)
        if adapted is None:
            words = in_words([(output.shape[1:], output.dtype) for output in found], layout)
            failures.update(dict.fromkeys(part_rows, Failure(f"returned {words}")))
            continue
        index = slice(part_rows.start, part_rows.stop) if isinstance(part_rows, range) else part_rows
        for output, values in zip(outputs, adapted, strict=True):
            output[index] = values
    return outputs, failures


def _layout(parts: list[Part]) -> Layout:
    votes: Counter[tuple[tuple[int, ...], ...]] = Counter()
    for rows, outputs in parts:
        votes[tuple([output.shape[1:] for output in outputs])] += len(rows)
    shapes = votes.most_common(1)[0][0]
    fitting = [outputs for _, outputs in parts if tuple([output.shape[1:] for output in outputs]) == shapes]
    return tuple(
        [
            (shape, np.result_type(*{outputs[position].dtype for outputs in fitting}))
            for position, shape in enumerate(shapes)
        ]
    )


def _adapted(outputs: list[Array], layout: Layout) -> list[Array] | None:
    """The outputs in the dtypes of the layout; None where they are of another shape, or numbers would be lost."""
    if len(outputs) != len(layout):
        return None
    adapted = []
    for output, (shape, dtype) in zip(outputs, layout, strict=True):
        if output.shape[1:] != shape:
            return None
        if output.dtype != dtype and dtype.kind != "f":
            cast = output.astype(dtype)
            if output.dtype.kind not in "iu" or dtype.kind == "b" or (cast != output).any():
                return None
            output = cast
        adapted.append(output.astype(dtype, copy=False))
    return adapted
