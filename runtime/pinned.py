"""Tensors that backward reads again, and that nobody may change in place until then."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from .errors import RewriteError
from .segment import Segment


class Pinned:
    """Remembers the versions of tensors, as a tape does of what it saves."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        kept = [tensor for tensor in tensors if not tensor.is_inference()]
        self._versions = [(tensor, tensor._version) for tensor in kept]

    def check(self, region: str) -> None:
        """Raises RewriteError where one has changed."""
        for tensor, version in self._versions:
            if tensor._version != version:
                raise RewriteError(
                    f"a tensor of shape {tuple(tensor.shape)} was changed in place between forward and backward",
                    where=region,
                    why="what follows the cut, or the loss, reads it again in backward",
                    remedy="call backward first, or change a copy",
                )


def held_by(segments: Iterable[Segment]) -> Iterator[Tensor]:
    """The parameters and buffers that code reads; what several segments read is asked once."""
    places = {(id(place.mapping), place.key): place for segment in segments for place in segment.places}
    for place in places.values():
        value = place.mapping[place.key]
        if isinstance(value, nn.Module):
            yield from value.parameters()
            yield from value.buffers()
        elif isinstance(value, Tensor):
            yield value
