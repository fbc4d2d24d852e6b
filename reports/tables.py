"""Records as rows that people read: MiB, thousands separators, milliseconds, and a dash where nothing was obtained."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from reports.record import SOURCES, STATUSES, Record, meaning

MISSING = "—"
MIB = 2**20
GIB = 2**30
# From here on digits stop helping a reader (and Python refuses to print very long integers): the power of ten is shown.
UNREADABLE = 10**18

UNMATCHED = "unmatched"

# What two records must share for the ratio of their memory to mean anything.
CONDITIONS = (
    "targets",
    "adapter_dtype",
    "attention",
    "optimizer",
    "optimizer_impl",
    "checkpointing",
    "accumulate",
    "data",
    "source",
    "device",
    "device_semantics",
    "gpu",
    "device_name",
    "threads",
    "allocator",
    "torch_version",
    "transformers_version",
)
# Said of every table as well: shared values above it, differing ones as columns of it.
CIRCUMSTANCES = (
    *CONDITIONS,
    "attention_kernel",
    "equal_trainable",
    "equal_memory",
    "padding_fraction",
    "lr",
    "seed",
    "pairing",
    "timed_rounds",
)
ENVIRONMENT = (
    "created_at",
    "commit",
    "python_version",
    "torch_version",
    "transformers_version",
    "platform",
    "device",
    "device_name",
    "driver",
    "threads",
    "allocator",
)
# What is not said beside a name: how figures draw a prediction, a reference that all share, how steps were timed.
_NOT_NAMED = ("source", "equal_trainable", "equal_memory", "pairing", "timed_rounds")
# What only a prediction says.
_PREDICTIONS_OWN = ("gpu", "attention_kernel")
# Ratios of peaks are taken to these methods, where a table has them.
REFERENCES = ("lora", "full")

_ALONE = re.compile(r"(layer|block) (\d{1,9})x(\d{1,9})")


def number(value: int | float | None, scale: Fraction = Fraction(1), decimals: int = 2) -> str:
    """`value` x `scale` with thousands separators; None is `MISSING`; a small number is never rounded to zero."""
    if value is None:
        return MISSING
    exact = Fraction(value) * scale
    if exact == 0:
        return "0"
    sign = "-" if exact < 0 else ""
    size = abs(exact)
    if size >= UNREADABLE:
        return f"{sign}≈10^{math.log10(size.numerator) - math.log10(size.denominator):.1f}"
    smallest = Fraction(1, 10**decimals)
    if size < smallest:
        return f"{'>' if sign else '<'}{sign}{float(smallest):.{decimals}f}"
    return f"{sign}{float(size):,.{decimals}f}"


def mib(size_bytes: int | None) -> str:
    """Bytes as MiB (2^20 bytes), without the unit."""
    return number(size_bytes, Fraction(1, MIB))


def gib(size_bytes: int | None) -> str:
    """Bytes as GiB (2^30 bytes), without the unit."""
    return number(size_bytes, Fraction(1, GIB))


def count(entries: int | None) -> str:
    """A count with thousands separators."""
    return number(entries, decimals=0)


def milliseconds(time_s: float | None) -> str:
    """Seconds as milliseconds, without the unit."""
    return number(time_s, Fraction(1000))


def time_ratio(record: Record) -> str:
    """The step's time to that of full fine-tuning's neighbouring step, with its interval: ``0.63 (0.61 to 0.66)``."""
    if record.step_time_ratio is None:
        return MISSING
    ends = [number(end) for end in (record.step_time_ratio_low, record.step_time_ratio_high)]
    interval = "no interval" if MISSING in ends else " to ".join(ends)
    return f"{number(record.step_time_ratio)} ({interval})"


def ratio(value: int | float | None, reference: int | float | None) -> Fraction | None:
    """`value` over `reference`, exactly; None where either was not obtained or the reference is 0."""
    if value is None or reference is None or reference == 0:
        return None
    return Fraction(value) / Fraction(reference)


def percent(part: Fraction | None) -> str:
    """A part of a whole as per cent, without the sign."""
    return number(part, Fraction(100))


def plain(value: object) -> str:
    """Any field's value that is neither a size, a count nor a time."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def status(record: Record) -> str:
    """The status; one other than ok with its reason."""
    if record.status == "ok":
        return "ok"
    return f"{record.status}: {record.reason or 'no reason recorded'}"


def matching(record: Record) -> str:
    """Whether the method's budget was matched to the reference's, and why it was not."""
    if record.matched is False:
        if record.status == "ok" and record.reason:
            return f"{UNMATCHED}: {record.reason}"
        return f"{UNMATCHED}: {'no budget to match' if record.budget is None else 'a budget of its own'}"
    return "matched" if record.matched else MISSING


def summary(records: Sequence[Record]) -> str:
    """How many records there are, by status and by source, in one line."""
    statuses = Counter(record.status for record in records)
    sources = Counter(record.source for record in records)
    parts = [f"{statuses[name]:,} {name}" for name in STATUSES if statuses[name]]
    parts += [f"{sources[name]:,} {name}" for name in SOURCES if sources[name]]
    noun = "record" if len(records) == 1 else "records"
    return f"{len(records):,} {noun}: {', '.join(parts)}" if records else "no records"


def alone(model: str) -> tuple[str, int, int] | None:
    """What a layer, or two blocks, of no model are called: layer or block, D_in, D_out; None for a model."""
    match = _ALONE.fullmatch(model)
    return None if match is None else (match[1], int(match[2]), int(match[3]))


@dataclass(frozen=True)
class Workload:
    """What makes records comparable side by side: the model, the shape and dtype of its batch, and whose kernels."""

    model: str
    batch: int | None
    seq: int | None
    dtype: str
    semantics: str

    @classmethod
    def of(cls, record: Record) -> Workload:
        """The workload that a record was taken on."""
        return cls(record.model, record.batch, record.seq, record.dtype, record.device_semantics)

    @property
    def title(self) -> str:
        """The workload in one line."""
        return f"{self.model}, {self.shape}"

    @property
    def shape(self) -> str:
        """The batch's shape and dtype, and CUDA where its kernels' memory is meant."""
        cuda = ", CUDA" if self.semantics == "cuda" else ""
        return f"batch {plain(self.batch)}, seq {plain(self.seq)}, {self.dtype}{cuda}"


def by_workload(records: Iterable[Record]) -> dict[Workload, dict[str, list[Record]]]:
    """The records by workload in the order they come, then by `train_rest`, `all` before `none`."""
    groups: dict[Workload, dict[str, list[Record]]] = {}
    for record in records:
        groups.setdefault(Workload.of(record), {}).setdefault(record.train_rest, []).append(record)
    return {workload: dict(sorted(regimes.items())) for workload, regimes in groups.items()}


def shared_circumstances(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Field and value of every circumstance that all `records` have in common and that is known."""
    differing = differing_circumstances(records)
    shared = ((name, getattr(records[0], name)) for name in CIRCUMSTANCES if name not in differing)
    return [(name, plain(value)) for name, value in shared if value is not None]


def differing_circumstances(records: Sequence[Record]) -> list[str]:
    """The circumstances in which `records` differ."""
    return [name for name in CIRCUMSTANCES if len({getattr(record, name) for record in records}) > 1]


def variation(record: Record, group: Sequence[Record]) -> str:
    """What tells `record` from the others of `group` besides its label."""
    names = (name for name in naming_circumstances(group) if _tells(record, name))
    return ", ".join(f"{name} {plain(getattr(record, name))}" for name in names)


def naming_circumstances(group: Sequence[Record]) -> list[str]:
    """The circumstances that tell the records of `group` apart where their labels do not."""
    return [
        name
        for name in differing_circumstances(group)
        if name not in _NOT_NAMED and len({getattr(record, name) for record in group if _tells(record, name)}) > 1
    ]


def _tells(record: Record, name: str) -> bool:
    """Whether the circumstance is known: a prediction ran on nothing, and a run that failed may not have got so far."""
    if getattr(record, name) is not None:
        return True
    return record.status == "ok" and record.source == "measured" and name not in _PREDICTIONS_OWN


def environment(records: Iterable[Record]) -> list[tuple[str, list[tuple[str, int]]]]:
    """For each environment field its values, most frequent first, each with the number of records that have it."""
    records = list(records)
    return [
        (name, Counter(plain(getattr(record, name)) for record in records).most_common())
        for name in ENVIRONMENT
        if name != "created_at"
    ]


def period(records: Iterable[Record]) -> tuple[str, str] | None:
    """The earliest and the latest `created_at`; None where no record has one."""
    times = sorted(record.created_at for record in records if record.created_at is not None)
    return (times[0], times[-1]) if times else None


@dataclass(frozen=True)
class Column:
    """A column: the group it stands under, its heading, and the Record field that defines it, or `says` what does."""

    group: str
    heading: str
    field: str
    numeric: bool = True
    says: str | None = None

    @property
    def definition(self) -> str:
        """What stands in the column, in one line."""
        return self.says or f"{self.field}: {meaning(self.field)}"


@dataclass(frozen=True)
class Cell:
    """A cell: what is shown, and what it is sorted by (None sorts last)."""

    text: str
    sort: str | None

    @property
    def missing(self) -> bool:
        """Whether the value was not obtained."""
        return self.sort is None


@dataclass(frozen=True)
class Row:
    """One record and its cells, in the order of the table's columns."""

    record: Record
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """The records of one workload and regime; `references` names what each ratio column divides by."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    references: tuple[str, ...]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Each group of adjacent columns with the number of columns it spans."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.group:
                spans[-1] = (column.group, spans[-1][1] + 1)
            else:
                spans.append((column.group, 1))
        return spans


_LIVE = (
    Column("live memory, MiB", "resident", "resident_bytes"),
    Column("peak live memory, MiB", "forward", "peak_forward_bytes"),
    Column("peak live memory, MiB", "backward", "peak_backward_bytes"),
    Column("peak live memory, MiB", "optimizer", "peak_optimizer_bytes"),
    Column("peak live memory, MiB", "step", "peak_step_bytes"),
    Column("peak live memory, MiB", "eval", "peak_eval_bytes"),
    Column("peak live memory, MiB", "preparation", "peak_preparation_bytes"),
    Column("unseen by the tracker, MiB", "kernel workspace", "kernel_workspace_bytes"),
    Column("unseen by the tracker, MiB", "process peak", "process_peak_bytes"),
)
# Only where a record has them: they do not exist on CPU.
_CUDA = (
    Column("CUDA, MiB", "requested", "peak_requested_bytes"),
    Column("CUDA, MiB", "reserved", "peak_reserved_bytes"),
    Column("CUDA, MiB", "driver", "nvml_process_bytes"),
)
_TIME = (
    Column("step time", "ms", "step_time_s"),
    Column("step time", "to\u00a0full's, with interval", "step_time_ratio"),
)
_COUNTS = (
    Column("parameters", "budget", "budget_params"),
    Column("parameters", "trainable", "trainable_params"),
    Column("parameters", "updated", "updated_params"),
    Column("parameters", "state", "state_params"),
    Column("parameters", "touched", "touched_params"),
)


def results_table(records: Sequence[Record]) -> Table:
    """The table of records of one workload and regime, with peaks to those of `REFERENCES` where it has them."""
    differing = differing_circumstances(records)
    described = (
        Column("run", "method", "method", numeric=False),
        Column("outcome", "budget matched", "matched", numeric=False),
        Column("outcome", "status", "status", numeric=False),
        *(Column("differs", name.replace("_", " "), name, numeric=False) for name in differing),
    )
    cuda = tuple(column for column in _CUDA if any(getattr(record, column.field) is not None for record in records))
    present = [method for method in REFERENCES if any(record.method == method for record in records)]
    ratios = tuple((method, Column("ratio", f"peak\u00a0/\u00a0{method}", "peak_step_bytes")) for method in present)
    columns = (*described, *_LIVE, *cuda, *(column for _, column in ratios), *_TIME, *_COUNTS)

    found = references(records)
    used: dict[str, None] = {}
    rows = []
    for record in records:
        cells = [text_cell(record, column) for column in described]
        cells += [_value_cell(record, column.field) for column in (*_LIVE, *cuda)]
        for method, _ in ratios:
            reference = found.get((method, conditions(record)))
            cell = _ratio_cell(record, reference)
            if reference is not None and not cell.missing:
                used.setdefault(reference.label)
            cells.append(cell)
        cells += [_value_cell(record, column.field) for column in (*_TIME, *_COUNTS)]
        rows.append(Row(record, tuple(cells)))
    return Table(columns, tuple(rows), tuple(used))


def references(records: Iterable[Record]) -> dict[tuple[str, tuple[object, ...]], Record]:
    """For each method and `CONDITIONS` the first record that ended ok: what ratios under these conditions divide by."""
    found: dict[tuple[str, tuple[object, ...]], Record] = {}
    for record in records:
        if record.status == "ok":
            found.setdefault((record.method, conditions(record)), record)
    return found


def peak_ratio(record: Record, reference: Record | None) -> Fraction | None:
    """The step's peak to that of `reference`; None where there is none or either peak was not obtained."""
    return None if reference is None else ratio(record.peak_step_bytes, reference.peak_step_bytes)


def conditions(record: Record) -> tuple[object, ...]:
    """What `record` must share with another for the ratio of their memory to mean anything."""
    return tuple(getattr(record, name) for name in CONDITIONS)


def text_cell(record: Record, column: Column) -> Cell:
    """A cell of a field that is neither a size, a count nor a time."""
    match column.field:
        case "method":
            text = record.label
        case "matched":
            text = matching(record)
        case "status":
            text = status(record)
        case name:
            text = plain(getattr(record, name))
    return Cell(text, None if text == MISSING else text)


def _value_cell(record: Record, field: str) -> Cell:
    value = getattr(record, field)
    if field == "step_time_ratio":
        text = time_ratio(record)
    else:
        show = mib if field.endswith("_bytes") else milliseconds if field.endswith("_s") else count
        text = show(value)
    return Cell(text, None if value is None else str(value))


def _ratio_cell(record: Record, reference: Record | None) -> Cell:
    value = peak_ratio(record, reference)
    return Cell(number(value, decimals=3), sort_key(value))


def sort_key(value: Fraction | None) -> str | None:
    """By what a fraction is sorted on the page; None where there is none."""
    if value is None:
        return None
    return "Infinity" if value >= UNREADABLE else repr(float(value))
