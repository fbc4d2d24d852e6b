"""Live bytes through one step as a series that fits into a field of a flat record: what the timeline figure draws."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reports.reading import parse, shown

# More samples than a screen has pixels across are of no use to a figure.
MOST_SAMPLES = 4096


@dataclass(frozen=True)
class Timeline:
    """Live bytes by category at instants of a step, counted in allocations and frees since its start.

    Between two samples memory stays within what the two show: where a stretch of the log is thinned out, the instants
    of its least and of its most live bytes are kept.
    """

    phases: tuple[tuple[str, int], ...]  # name, instant at which it starts; in order, the first at 0
    at: tuple[int, ...]  # the instants of the samples, rising, the first at 0
    by_category: Mapping[str, tuple[int, ...]]  # field of the breakdown -> bytes at each instant

    def __post_init__(self):
        if not self.phases or self.phases[0][1] != 0 or not _rises([start for _, start in self.phases], strictly=False):
            raise ValueError("a timeline's phases must start at 0 and follow one another")
        if not self.at or self.at[0] != 0 or not _rises(self.at, strictly=True) or len(self.at) > MOST_SAMPLES:
            raise ValueError(f"a timeline needs 1 to {MOST_SAMPLES} samples at rising instants from 0")
        for name, series in self.by_category.items():
            if len(series) != len(self.at) or min(series) < 0:
                raise ValueError(f"a timeline needs a size that is not negative of {name} for each of its samples")

    @property
    def totals(self) -> tuple[int, ...]:
        """Live bytes at each instant."""
        return tuple(sum(sizes) for sizes in zip(*self.by_category.values(), strict=True))

    def dumps(self) -> str:
        """As text, for a record's field."""
        return json.dumps(
            {"phases": self.phases, "at": self.at, "by_category": dict(self.by_category)}, separators=(",", ":")
        )

    @classmethod
    def loads(cls, text: str, categories: Sequence[str]) -> Timeline:
        """From `dumps`' text, with exactly these categories. Raises ValueError for anything else."""
        try:
            raw = parse(text)
            phases = tuple((str(name), _size(start)) for name, start in raw["phases"])
            at = tuple(_size(instant) for instant in raw["at"])
            by_category = {name: tuple(_size(n) for n in raw["by_category"][name]) for name in categories}
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"not a timeline: {type(error).__name__}: {error}") from error
        if set(raw["by_category"]) != set(categories):
            raise ValueError(f"a timeline's categories must be {', '.join(categories)}")
        return cls(phases, at, by_category)


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{shown(value)} is not an integer")
    return value


def _rises(values: Sequence[int], strictly: bool) -> bool:
    return all(a < b or (a == b and not strictly) for a, b in itertools.pairwise(values))
