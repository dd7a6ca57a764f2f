"""What a model is made of: cuts, residual chains, repeats and recurrences of a captured program."""

from .analyse import analyse
from .result import Chain, ChainSegment, Recurrence, Repeat, Span, Structure

__all__ = ["Chain", "ChainSegment", "Recurrence", "Repeat", "Span", "Structure", "analyse"]
