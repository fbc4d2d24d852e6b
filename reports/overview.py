"""The whole matrix at once: the peak of a step for every workload and method, and what it is to LoRA's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reports import tables
from reports.palette import by_name
from reports.record import Record

# The methods, and the records in one cell; more would hide what an overview is for.
MOST_METHODS = 28
MOST_ENTRIES = 3
# More methods than this stand one below the other where there are fewer workloads: side by side they would not be seen.
MOST_ACROSS = 13


@dataclass(frozen=True)
class Entry:
    """One record in a cell: its name beside others, its peak in MiB, that to LoRA's, and its step time to full's."""

    record: Record
    name: str
    peak: str
    ratio: str
    time: str
    share: float | None  # its peak as a part of the largest in the row; None where that was not obtained


@dataclass(frozen=True)
class Cell:
    """A method's records on a workload in one regime: the first `MOST_ENTRIES`, and how many there are besides."""

    entries: tuple[Entry, ...]
    left_out: int


@dataclass(frozen=True)
class Row:
    """A workload and regime, the number of its section on the page, and a cell for each method."""

    workload: tables.Workload
    section: int
    regime: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Overview:
    """The peak of every workload and method at once; `left_out` methods are not in it."""

    methods: tuple[str, ...]
    rows: tuple[Row, ...]
    left_out: int

    @property
    def upright(self) -> bool:
        """Whether the page has methods as rows and workloads as columns."""
        return len(self.methods) > max(MOST_ACROSS, len(self.rows))


def overview(records: Sequence[Record]) -> Overview:
    """Every workload and regime with every method."""
    methods = sorted({record.method for record in records}, key=by_name)
    shown = tuple(methods[:MOST_METHODS])
    rows = [
        Row(workload, section, regime, _cells(group, shown))
        for section, (workload, regimes) in enumerate(tables.by_workload(records).items(), start=1)
        for regime, group in regimes.items()
    ]
    return Overview(shown, tuple(rows), len(methods) - len(shown))


def _cells(group: Sequence[Record], methods: Sequence[str]) -> tuple[Cell, ...]:
    references = tables.references(group)
    largest = max((record.peak_step_bytes or 0 for record in group), default=0)
    cells = []
    for method in methods:
        some = [record for record in group if record.method == method]
        entries = [
            _entry(record, some, references.get(("lora", tables.conditions(record))), largest)
            for record in some[:MOST_ENTRIES]
        ]
        cells.append(Cell(tuple(entries), len(some) - len(entries)))
    return tuple(cells)


def _entry(record: Record, some: Sequence[Record], lora: Record | None, largest: int) -> Entry:
    share = tables.ratio(record.peak_step_bytes, largest)
    return Entry(
        record,
        ", ".join(part for part in (_budget(record), tables.variation(record, some)) if part),
        tables.mib(record.peak_step_bytes),
        tables.number(tables.peak_ratio(record, lora)),
        tables.number(record.step_time_ratio),
        None if share is None else float(share),
    )


def _budget(record: Record) -> str:
    return "" if record.budget is None else f"[{record.budget}]"
