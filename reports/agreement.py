"""Predictions beside the measurements of the same configuration, figure by figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from reports import tables
from reports.record import Record
from reports.tables import Cell, Column, Row, Table

# What a prediction and a measurement must share to be of the same configuration.
CONFIGURATION = (
    "method",
    "budget",
    "model",
    "data",
    "batch",
    "seq",
    "dtype",
    "adapter_dtype",
    "targets",
    "train_rest",
    "attention",
    "optimizer",
    "optimizer_impl",
    "checkpointing",
    "accumulate",
    "seed",
    "device_semantics",
)
# What is compared, and what it is called.
FIGURES = {
    "resident_bytes": "resident",
    "peak_forward_bytes": "peak, forward",
    "peak_backward_bytes": "peak, backward",
    "peak_optimizer_bytes": "peak, optimizer",
    "peak_eval_bytes": "peak, eval",
    "peak_preparation_bytes": "peak, preparation",
    "peak_requested_bytes": "peak, requested",
    "peak_reserved_bytes": "peak, reserved",
}


@dataclass(frozen=True)
class Pair:
    """A measurement and a prediction of the same configuration."""

    measured: Record
    predicted: Record

    @property
    def comparisons(self) -> list[Comparison]:
        """Each figure that either of the two has."""
        values = ((name, getattr(self.measured, name), getattr(self.predicted, name)) for name in FIGURES)
        return [Comparison(self, *each) for each in values if each[1:] != (None, None)]


@dataclass(frozen=True)
class Comparison:
    """One figure of a pair, bytes; None where it was not obtained."""

    pair: Pair
    field: str
    measured: int | None
    predicted: int | None

    @property
    def difference(self) -> int | None:
        """The prediction less the measurement, bytes."""
        return None if None in (self.measured, self.predicted) else self.predicted - self.measured

    @property
    def share(self) -> Fraction | None:
        """The difference as a part of the measurement."""
        return tables.ratio(self.difference, self.measured)


def pairs(records: Iterable[Record]) -> list[Pair]:
    """Each measurement with each card's first prediction of its configuration, both ended ok, in their order."""
    records = [record for record in records if record.status == "ok"]
    predictions: dict[tuple[object, ...], dict[str | None, Record]] = {}
    for record in records:
        if record.source == "predicted":
            predictions.setdefault(_configuration(record), {}).setdefault(record.gpu, record)
    return [
        Pair(record, prediction)
        for record in records
        if record.source == "measured"
        for prediction in predictions.get(_configuration(record), {}).values()
    ]


def summary(pairs: Sequence[Pair]) -> str:
    """How many figures agree to the byte, and the largest difference, in a sentence or two."""
    compared = [one for pair in pairs for one in pair.comparisons if one.difference is not None]
    equal = sum(one.difference == 0 for one in compared)
    beginning = f"{_number(len(pairs), 'pair')} of a measurement and a prediction, {_number(len(compared), 'figure')}"
    if equal == len(compared):
        return f"{beginning}: all agree to the byte." if compared else f"{beginning} that both have."
    worst = max(compared, key=_size)
    record = worst.pair.measured
    by = f"{tables.mib(abs(worst.difference))} MiB"
    if worst.share is not None:
        by += f", or {tables.percent(abs(worst.share))}\u00a0%,"
    card = worst.pair.predicted.gpu
    return (
        f"{beginning}: {tables.count(equal)} agree to the byte. The largest difference is that of {record.label} on "
        f"{tables.Workload.of(record).title} (train_rest {record.train_rest}), {FIGURES[worst.field]}: the prediction"
        f"{f' for {card}' if card else ''} is {by} {'above' if worst.difference > 0 else 'below'} the "
        f"{tables.mib(worst.measured)} MiB measured."
    )


def circumstances(pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    """What was measured on, and what was predicted for, with the versions of either."""
    measured, predicted = [pair.measured for pair in pairs], [pair.predicted for pair in pairs]
    return [
        ("measured on", _values(measured, "device_name")),
        ("predicted for", _values(predicted, "gpu" if any(record.gpu for record in predicted) else "device_semantics")),
        ("torch, measured", _values(measured, "torch_version")),
        ("torch, predicted", _values(predicted, "torch_version")),
    ]


def table(pairs: Sequence[Pair]) -> Table:
    """A row for each figure of each pair: MiB measured and predicted, and the difference."""
    names = tables.naming_circumstances([pair.measured for pair in pairs])
    # Of a measurement the device's name says it.
    cards = len({pair.predicted.gpu for pair in pairs}) > 1
    columns = (
        _METHOD,
        *(Column("differs", name.replace("_", " "), name, numeric=False) for name in names),
        *((_CARD,) if cards else ()),
        *_COMPARED,
    )
    rows = []
    for pair in pairs:
        described = [tables.text_cell(pair.measured, column) for column in columns[: 1 + len(names)]]
        described += [tables.text_cell(pair.predicted, _CARD)] if cards else []
        rows += [Row(pair.measured, (*described, *_cells(one))) for one in pair.comparisons]
    return Table(columns, tuple(rows), ())


_METHOD = Column("run", "method", "method", numeric=False)
_CARD = Column("differs", "predicted for", "gpu", numeric=False)
_COMPARED = (
    Column("figure", "bytes compared", "", numeric=False, says="which of the record's figures the row compares"),
    Column("MiB", "measured", "", says="the measured record's"),
    Column("MiB", "predicted", "", says="the predicted record's"),
    Column("predicted less measured", "MiB", "", says="the prediction less the measurement"),
    Column("predicted less measured", "%", "", says="that as a part of the measurement"),
)


def _cells(one: Comparison) -> tuple[Cell, ...]:
    sizes = (one.measured, one.predicted, one.difference)
    return (
        Cell(FIGURES[one.field], FIGURES[one.field]),
        *(Cell(tables.mib(size), None if size is None else str(size)) for size in sizes),
        Cell(tables.percent(one.share), tables.sort_key(one.share)),
    )


def _configuration(record: Record) -> tuple[object, ...]:
    return tuple(getattr(record, name) for name in CONFIGURATION)


def _size(one: Comparison) -> tuple[bool, Fraction, int]:
    """By what differences are large: as a part of the measurement, of which 0 has none that would not be endless."""
    share = one.share
    return (share is None and one.difference != 0, abs(share or Fraction(0)), abs(one.difference))


def _values(records: Iterable[Record], name: str) -> str:
    return ", ".join(dict.fromkeys(tables.plain(getattr(record, name)) for record in records))


def _number(number: int, noun: str) -> str:
    return f"{tables.count(number)} {noun}{'' if number == 1 else 's'}"
