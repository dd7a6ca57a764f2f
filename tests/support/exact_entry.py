"""A plan entry for tests: the part's own operations, differentiated exactly, but through the bridge of every rule."""

from dataclasses import dataclass
from typing import ClassVar

from rewriter.passes.base import Entry, Refused
from rewriter.passes.regions import regions_at
from rewriter.passes.targets import Target, resolve
from rewriter.runtime.exact import ExactRule


@dataclass(frozen=True)
class Exact(Entry):
    name: ClassVar[str] = "exact-oracle"
    target: Target

    def apply(self, program):
        regions = list(program.regions)
        for place in resolve(self.target, program.model):
            found = regions_at(self, place, program)
            if isinstance(found, Refused):
                return found
            regions += found
        return program.with_(regions=tuple(regions))

    def rule(self, program, region, segment, ledger, known):
        return ExactRule(segment, ledger)


@dataclass(frozen=True)
class Wrong(Exact):
    """The negative control: the same rule with its gradients scaled by `factor`."""

    name: ClassVar[str] = "wrong"
    factor: float = 0.5

    def rule(self, program, region, segment, ledger, known):
        return _Scaled(segment, ledger, self.factor)


class _Scaled(ExactRule):
    def __init__(self, segment, ledger, factor):
        super().__init__(segment, ledger)
        self.factor = factor

    def backward(self, call, taken, cotangents, needed):
        found = super().backward(call, taken, cotangents, needed)
        return tuple(None if gradient is None else gradient * self.factor for gradient in found)
