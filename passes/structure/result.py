"""What the analysis says, as plain data: nodes by name, in graph order."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Repeat:
    """`count` equal units of `period` neighbouring segments, the first at `start`: same operations, same shapes.

    shared: every unit uses the same parameters (a recurrence) rather than its own.
    """

    start: int
    period: int
    count: int
    shared: bool

    def __str__(self) -> str:
        kind = ", the same parameters" if self.shared else ""
        return f"{self.count} x {self.period} segment(s) from number {self.start + 1}{kind}"


@dataclass(frozen=True)
class Span:
    """What lies between two neighbouring cuts: the values `input` and `output` are all that gradients cross.

    nodes: with the reads of parameters that only they use, `output` among them; side_inputs: what they read beside
    `input`; read_elsewhere: values inside, or `output`, that the graph also reads off the way, or returns.
    """

    input: str
    output: str
    nodes: tuple[str, ...]
    side_inputs: tuple[str, ...]
    read_elsewhere: tuple[str, ...]


@dataclass(frozen=True)
class ChainSegment(Span):
    """A span of a chain: output = after(skip(input) + branch(input)), or, where `skip` is "none", anything straight.

    skip: "identity"; "projection" (the input is mapped: a convolution, a slice, a scale); "gate" (it is multiplied by
    what the branch computes); "none" for what joins two residual segments without a skip of its own (downsampling).
    skip_nodes: what the input goes through on its way to `add`: the mapping or gate, casts and copies, inner sums.
    branch: the nodes that depend on the input, but for the skip's, `add` and `after`; add: the sum, None where there
    is no skip; after: what is applied to it before the next segment (activation, norm). block: the module of the sum.
    """

    skip: str
    skip_nodes: tuple[str, ...]
    branch: tuple[str, ...]
    add: str | None
    after: tuple[str, ...]
    block: str

    def __str__(self) -> str:
        where = f"{self.block}: " if self.block else ""
        if self.add is None:
            return f"{where}{self.input} -> {self.output}  no skip, {len(self.branch)} node(s)"
        skip = self.skip + (f" ({', '.join(self.skip_nodes)})" if self.skip_nodes else "")
        after = f", then {', '.join(self.after)}" if self.after else ""
        return f"{where}{self.input} -> {self.output}  {skip} + {len(self.branch)} node(s){after}"


@dataclass(frozen=True)
class Chain:
    """Segments one after the other, each reading the last one's output; at least two of them are residual."""

    segments: tuple[ChainSegment, ...]
    repeats: tuple[Repeat, ...]

    @property
    def input(self) -> str:
        return self.segments[0].input

    @property
    def output(self) -> str:
        return self.segments[-1].output

    @property
    def values(self) -> tuple[str, ...]:
        """The cuts, the chain's input first."""
        return (self.input, *(segment.output for segment in self.segments))

    @property
    def residual(self) -> tuple[ChainSegment, ...]:
        """The segments with a skip."""
        return tuple(segment for segment in self.segments if segment.add is not None)

    @property
    def side_inputs(self) -> tuple[str, ...]:
        """What its segments read from outside the chain."""
        inside = {name for segment in self.segments for name in segment.nodes}
        sides = (name for segment in self.segments for name in segment.side_inputs)
        return tuple(dict.fromkeys(name for name in sides if name not in inside))

    def __str__(self) -> str:
        count = len(self.residual)
        lines = [f"residual chain of {count} segments, {self.input} -> {self.output}"]
        lines += [f"  {number:3} {segment}" for number, segment in enumerate(self.segments, 1)]
        lines += [f"  repeats: {repeat}" for repeat in self.repeats]
        readers = Counter(name for segment in self.segments for name in segment.side_inputs)
        several = [name for name in self.side_inputs if readers[name] > 1]
        lines += [f"  beside it: {name}, read by {readers[name]} segments" for name in several]
        single = len(self.side_inputs) - len(several)
        lines += [f"  beside it: {single} value(s) that one segment reads"] if single else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Recurrence:
    """One cell, called step after step on its own state.

    cell: the module, or the parameter that the loop itself reads; several, where they wait for each other.
    kind: "loop", or "GRU", "LSTM", "RNN" for a call of torch's module, which is one node.
    steps: None where the length is not in the input's shape. parameters: all that the steps share.
    For loops only: calls, the nodes of each step, with what stands between one call of the cell and the next; states,
    the values that each step leaves to the next one; initial, what the first step starts from, in the same order;
    side_inputs, what each step reads beside the state. initial is empty where the first step differs from the
    others, the last step's state where the model reads only a part of it.
    """

    cell: str
    kind: str
    steps: int | None
    parameters: tuple[str, ...]
    calls: tuple[tuple[str, ...], ...]
    initial: tuple[str, ...]
    states: tuple[tuple[str, ...], ...]
    side_inputs: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        steps = f"{self.steps} steps" if self.steps is not None else "steps not known before the run"
        state = f", state {', '.join(self.states[0])} ..." if self.states else ""
        return f"recurrence ({self.kind}) of {self.cell}: {steps}, {len(self.parameters)} parameters{state}"


@dataclass(frozen=True)
class Structure:
    """What `analyse` found.

    cuts: where a single differentiable tensor is alive on the main line, in graph order; spans: what lies between.
    repeats: of spans. reason: in words, why there is no chain; empty where there is one.
    """

    cuts: tuple[str, ...]
    spans: tuple[Span, ...]
    repeats: tuple[Repeat, ...]
    chains: tuple[Chain, ...]
    recurrences: tuple[Recurrence, ...]
    reason: str

    def __str__(self) -> str:
        lines = [f"{len(self.cuts)} single-tensor cuts"]
        lines += [f"repeats: {repeat}" for repeat in self.repeats]
        lines += [str(chain) for chain in self.chains] or [f"no residual chain here: {self.reason}"]
        lines += [str(recurrence) for recurrence in self.recurrences]
        return "\n".join(lines)
