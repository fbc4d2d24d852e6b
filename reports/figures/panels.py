"""What the figures of a workload share: which records they draw, what they call them, and what they say of failures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reports import tables
from reports.record import Record

Panels = Mapping[str, Sequence[Record]]

# A panel draws this many rows; past it they stop being comparable and the image becomes very tall.
MOST_ROWS = 28
# Sizes from here on (8 EiB, 9e18 entries) belong to no machine: they are printed, and not drawn to scale.
LARGEST_DRAWN = 2**63
NOT_OBTAINED = "not obtained"
TOO_LARGE = "too large to draw"
HATCH = "////"


def drawn(panels: Panels, most: int = MOST_ROWS) -> dict[str, list[Record]]:
    """The records of `panels` that a figure draws: the first `most` of each."""
    return {regime: list(group[:most]) for regime, group in panels.items()}


def flat(panels: Panels) -> list[Record]:
    """The records of all panels."""
    return [record for group in panels.values() for record in group]


def remarks(record: Record) -> str:
    """That a record is predicted, and that it did not end ok; empty for most."""
    notes = [record.source] if record.source != "measured" else []
    notes += [record.status] if record.status != "ok" else []
    return ", ".join(notes)


def not_obtained(record: Record) -> str:
    """That a value is missing, with the failure behind it where there was one."""
    return NOT_OBTAINED if record.status == "ok" else f"{NOT_OBTAINED} ({tables.status(record)})"


def words(title: str, workload: str, how: str, panels: Mapping[str, Sequence[str]]) -> str:
    """A figure in words: what it shows, then what stands in each panel."""
    parts = [f"{title}, {workload}: {how}."]
    parts += [f"train_rest {regime}: {'; '.join(entries)}." for regime, entries in panels.items()]
    return " ".join(parts)
