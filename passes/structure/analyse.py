"""`analyse`: a program's structure, for the entries of a plan and for whoever wants to know."""

from __future__ import annotations

from rewriter.passes.program import Program

from .chains import find
from .parts import parts
from .reasons import why_none
from .recurrences import recurrences
from .repeats import repeats
from .result import Span, Structure
from .stream import Stream


def analyse(program: Program) -> Structure:
    """Single-tensor cuts, residual chains, tandem repeats and recurrences of an annotated program.

    The program is not changed, and it costs about linear time in its nodes. A value is a cut relative to where a line
    of the graph starts and ends: what does not descend from the start is a side input, what does not get to the end
    is read elsewhere. `annotate` must have run: a program without values has no structure, and the reason says so.

    Dominators: Cooper, Harvey and Kennedy 2001; residual streams: He et al. 2016.
    """
    stream = Stream(program)
    found = find(stream)
    cuts = found.main.cuts if found.main else ()
    pieces = parts(stream, cuts, found.main.between) if found.main else []
    spans = tuple(
        Span(
            stream.nodes[start].name,
            stream.nodes[end].name,
            stream.names(piece.nodes),
            stream.names(piece.sides),
            stream.names(piece.elsewhere),
        )
        for start, end, piece in zip(cuts, cuts[1:], pieces, strict=False)
    )
    return Structure(
        cuts=stream.names(cut for cut in cuts if stream.differentiable[cut]),
        spans=spans,
        repeats=repeats(stream, cuts, pieces),
        chains=found.chains,
        recurrences=recurrences(stream),
        reason="" if found.chains else why_none(stream, found),
    )
