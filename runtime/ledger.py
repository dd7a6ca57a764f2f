"""What was spent, counted where it is spent."""

import threading
from dataclasses import dataclass, fields

_PURPOSES = ("forward", "probes", "step_size", "quality", "check")


@dataclass
class Counts:
    """One region's spending.

    capture: rows the box evaluated while the model was captured and proven, apart from all that follows;
    calls: calls of the box; forward, probes, step_size, quality, check: queries (rows evaluated by the box) by purpose;
    failed: queries among them that came back non-finite, of probes of a whole batch all its rows;
    stages: of what follows the cuts of a chain, rows times the stages they ran through;
    forwards: extra forwards of differentiable parts; vjps
    """

    capture: int = 0
    calls: int = 0
    forward: int = 0
    probes: int = 0
    step_size: int = 0
    quality: int = 0
    check: int = 0
    failed: int = 0
    stages: int = 0
    forwards: int = 0
    vjps: int = 0

    @property
    def queries(self) -> int:
        """Rows evaluated by the box since capture, whatever for."""
        return sum(getattr(self, purpose) for purpose in _PURPOSES)


_COLUMNS = ("capture", "calls", "queries", *_PURPOSES, "failed", "stages", "forwards", "vjps")


class Ledger:
    """Counts per region; increments are safe from any thread, `str()` is a small table."""

    def __init__(self) -> None:
        self._regions: dict[str, Counts] = {}
        self._lock = threading.Lock()

    def add(self, region: str, **amounts: int) -> None:
        """Adds to the named fields of `Counts` of one region; an unknown name raises KeyError."""
        with self._lock:
            counts = self._regions.get(region) or self._regions.setdefault(region, Counts())
            spent = counts.__dict__  # setattr and getattr would cost a microsecond for each
            for name in amounts:
                spent[name] += amounts[name]

    def __getitem__(self, region: str) -> Counts:
        """A copy of one region's counts, all zero where it has spent nothing."""
        with self._lock:
            counts = self._regions.get(region, Counts())
            return Counts(**{field.name: getattr(counts, field.name) for field in fields(Counts)})

    def regions(self) -> tuple[str, ...]:
        """Names of the regions that have spent something, in order of their first entry."""
        with self._lock:
            return tuple(self._regions)

    def total(self, name: str) -> int:
        """Sum of one field of `Counts`, or of "queries", over all regions."""
        return sum(getattr(self[region], name) for region in self.regions())

    def get_state(self) -> dict[str, dict[str, int]]:
        """Counts of every region as plain numbers."""
        return {region: vars(self[region]) for region in self.regions()}

    def set_state(self, state: dict[str, dict[str, int]]) -> None:
        """Continues from what `get_state` returned."""
        with self._lock:
            self._regions = {region: Counts(**counts) for region, counts in state.items()}

    def __getstate__(self) -> dict[str, dict[str, int]]:
        return self.get_state()

    def __setstate__(self, state: dict[str, dict[str, int]]) -> None:
        self.__init__()  # type: ignore[misc]
        self.set_state(state)

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("region", *_COLUMNS)]
        for region in self.regions():
            counts = self[region]
            lines.append((region, *(f"{getattr(counts, column):,}" for column in _COLUMNS)))
        if len(lines) > 2:
            lines.append(("total", *(f"{self.total(column):,}" for column in _COLUMNS)))
        widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS) + 1)]
        return "\n".join(
            "  ".join(
                [
                    line[0].ljust(widths[0]),
                    *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True)),
                ]
            )
            for line in lines
        )
