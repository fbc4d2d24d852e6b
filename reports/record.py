"""The one schema of a measurement: a flat `Record`, to and from JSON and CSV.

Sizes are integers of bytes in fields ending ``_bytes``; times are seconds in fields ending ``_s``; counts of
parameters end ``_params``. A number that was not obtained is None, never 0. Each field's meaning stands in its
metadata, so that tables, figures and docs take it from here.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
import types
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from reports.reading import hints, misfit, parse, read_text, shown
from reports.timeline import Timeline

SCHEMA_VERSION = 1

STATUSES = ("ok", "oom", "killed", "crashed", "timeout", "diverged", "refused")
SOURCES = ("measured", "predicted")
SEMANTICS = ("cpu", "cuda")

# What was live at the instant of `peak_step_bytes`, in the order figures stack it; the six add up to it.
BREAKDOWN = (
    "parameter_bytes",
    "basis_bytes",
    "optimizer_bytes",
    "gradient_bytes",
    "activation_bytes",
    "temporary_bytes",
)
PEAKS = ("peak_forward_bytes", "peak_backward_bytes", "peak_optimizer_bytes")
COUNTS = ("trainable_params", "updated_params", "state_params", "touched_params", "budget_params")
# How the steps of two workers were brought together: in turns, round by round, or, where two models do not fit at once,
# in blocks of rounds with one model in memory at a time.
PAIRINGS = ("rounds", "blocks")
# The level of the interval around a paired ratio of times. Not 95 %: of two honest 95 % intervals of the same ratio,
# each holds the other's median in five of six cases only.
RATIO_CONFIDENCE = 0.99

_NEVER_NEGATIVE = ("_bytes", "_params", "_s", "_ratio", "_low", "_high")


class RecordError(ValueError):
    """A results file that cannot be read, or a record that breaks the schema."""


class SchemaVersionError(RecordError):
    """A record of another version of the schema."""


def _f(meaning: str, default: object = None):
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True, kw_only=True)
class Record:
    """One method, measured or predicted once, on one workload."""

    # --- what was run
    method: str = field(metadata={"meaning": "registry name of the method"})
    model: str = field(
        metadata={"meaning": "what was trained: a checkpoint, preset or config, or layer/block and its shape"}
    )
    budget: int | float | str | None = _f("the method's knob as given: an integer count, a density in (0, 1], or AxB")
    matched: bool | None = _f(
        "with equal_trainable or equal_memory: whether the budget was matched (False: the method has none, was given "
        "its own, or reason says why none fits)"
    )
    equal_trainable: str | None = _f("the reference whose budget_params the other methods were matched to")
    equal_memory: str | None = _f(
        "the reference and the metric that budgets were matched to: each is the largest whose metric is no more"
    )
    targets: str = _f("which linear layers the method acts on", "mlp")
    train_rest: str = _f(
        "all: everything outside the target weights trains too; none: only the method's own and the head",
        "all",
    )
    data: str | None = _f("where inputs came from")
    batch: int | None = _f("examples per step, or per micro-batch where accumulate is more than 1")
    seq: int | None = _f("tokens per example, padding included")
    padding_fraction: float | None = _f("share of the measured batch's tokens that are padding")
    dtype: str = _f(
        "dtype of weights and activations; bf16-mixed: weights in float32, forward and loss under autocast to bfloat16",
        "float32",
    )
    adapter_dtype: str = _f("same: adapters in the model's dtype; float32: kept in float32", "same")
    attention: str | None = _f("attention implementation; None where there is no attention")
    optimizer: str = _f("of dense gradients: adamw, adamw8bit (8-bit moments), or sgd without momentum", "adamw")
    optimizer_impl: str = _f("implementation of AdamW or SGD: for-loop, foreach or fused", "for-loop")
    checkpointing: bool = _f("activation checkpointing", False)
    accumulate: int = _f("micro-batches of batch examples whose gradients one step of the optimizer takes", 1)
    calibration_steps: int | None = _f("backward passes that a method which calibrates may draw while it prepares")
    lr: float | None = _f("learning rate of every optimizer")
    seed: int = _f("seed of weights that are new, of data and of dropout", 0)
    device: str = _f("device that ran the step", "cpu")
    gpu: str | None = _f("predictions for CUDA: the card whose kernels are meant, by name or compute capability")
    attention_kernel: str | None = _f(
        "predictions for CUDA: what computes sdpa: flash, cudnn, efficient or math; several where layers differ"
    )
    device_semantics: str = _f("whose kernels' memory behaviour the figures describe: cpu or cuda", "cpu")
    source: str = _f("measured or predicted", "measured")
    status: str = _f("ok, oom, killed, crashed, timeout, diverged or refused", "ok")
    reason: str | None = _f("why the status is not ok, or why no budget could be matched")

    # --- memory, bytes
    resident_bytes: int | None = _f(
        "live after a step, gradients freed: weights, buffers, bases, optimizer state; on CUDA also what libraries keep"
    )
    peak_forward_bytes: int | None = _f("most bytes live in the forward of a steady-state step, resident included")
    peak_backward_bytes: int | None = _f("most bytes live in the backward of a steady-state step, resident included")
    peak_optimizer_bytes: int | None = _f("most bytes live in the optimizer of a steady-state step, resident included")
    peak_step_bytes: int | None = _f("the largest of the three phases: what decides whether training fits")
    peak_eval_bytes: int | None = _f("most bytes live in an evaluation pass with the training state held")
    peak_preparation_bytes: int | None = _f("most bytes live while the method prepares")
    kernel_workspace_bytes: int | None = _f(
        "what kernels and libraries hold for themselves in a step, which a tracker cannot see"
    )
    preparation_workspace_bytes: int | None = _f("the same during preparation")
    process_peak_bytes: int | None = _f(
        "the process's high-water mark (resident set), interpreter and libraries included"
    )
    peak_requested_bytes: int | None = _f("CUDA: most bytes requested in a step, before the allocator's rounding")
    peak_reserved_bytes: int | None = _f("CUDA: most bytes the caching allocator held in a step")
    gpu_memory_bytes: int | None = _f("CUDA: the card's memory that `fits` asks about, or that a run was held to")
    fits: bool | None = _f("predictions for CUDA: whether preparation and training fit in gpu_memory_bytes")
    oom_phase: str | None = _f(
        "where they do not fit: what runs out of memory first: loading, preparation, forward, backward or optimizer"
    )
    nvml_process_bytes: int | None = _f(
        "CUDA: what the driver charges the process when the step is over, its context and libraries included"
    )
    alloc_retries: int | None = _f(
        "CUDA: how often in the measured steps the device was full and the allocator gave its cache back to go on"
    )
    alloc_ooms: int | None = _f("CUDA: how often in the measured steps that was not enough and an allocation failed")
    parameter_bytes: int | None = _f("at the instant of peak_step_bytes: parameters and buffers, frozen ones too")
    basis_bytes: int | None = _f("at that instant: transition matrices and the like")
    optimizer_bytes: int | None = _f("at that instant: optimizer state")
    gradient_bytes: int | None = _f("at that instant: the storages of .grad")
    activation_bytes: int | None = _f("at that instant: born in forward and alive when it returned, the batch included")
    temporary_bytes: int | None = _f("at that instant: the rest")
    peak_phase: str | None = _f("the phase of the step in which peak_step_bytes occurred")
    timeline: str | None = _f(
        "live bytes by category through that step, a series (reports/timeline.py); not a column of the CSV"
    )

    # --- parameter counts
    total_params: int | None = _f("entries of all parameters, adapters included")
    trainable_params: int | None = _f("entries that may change")
    updated_params: int | None = _f("entries written in one step")
    state_params: int | None = _f("entries for which optimizer moments are stored")
    touched_params: int | None = _f("entries that differ after touched_steps steps")
    touched_steps: int | None = _f("the number of steps behind touched_params")
    budget_params: int | None = _f("what the method's budget stands for and what is matched between methods")

    # --- time, seconds (a pass of its own, no tracker)
    step_time_s: float | None = _f("median time of a training step over the rounds")
    step_time_min_s: float | None = _f("time of a step in the fastest round")
    step_time_max_s: float | None = _f("time of a step in the slowest round")
    reference_step_time_s: float | None = _f("median time of full fine-tuning's step in the same rounds")
    step_time_ratio: float | None = _f(
        "median over the rounds of the step's time to that of full fine-tuning's neighbouring step"
    )
    step_time_ratio_low: float | None = _f(f"lower end of the ratio's {RATIO_CONFIDENCE:.0%} interval")
    step_time_ratio_high: float | None = _f(f"upper end of the ratio's {RATIO_CONFIDENCE:.0%} interval")
    pairing: str | None = _f(
        "rounds: the two workers step in turns; blocks: one model in memory at a time, a ratio for each pair of blocks"
    )
    timed_rounds: int | None = _f("the number of rounds behind the times; a round is one period of the method's steps")
    timed_steps: int | None = _f("the number of steps behind the times")
    timed_span_s: float | None = _f("from the start of the first round to the end of the last: what the interval saw")
    preparation_time_s: float | None = _f("time the method took to prepare, untracked steps included")
    loss_first: float | None = _f("loss of the first step")
    loss_last: float | None = _f("loss of the last step")

    # --- environment
    created_at: str | None = _f("UTC time, ISO 8601")
    commit: str | None = _f("git commit of the suite; ends in -dirty when the tree had changes")
    python_version: str | None = _f("Python")
    torch_version: str | None = _f("torch")
    transformers_version: str | None = _f("transformers; None where the workload does not use it")
    platform: str | None = _f("operating system and architecture")
    device_name: str | None = _f("processor or GPU")
    driver: str | None = _f("CUDA: version of NVIDIA's driver")
    threads: int | None = _f("torch's intra-operation threads")
    allocator: str | None = _f("what the environment of the process told the C allocator and torch's")
    schema_version: int = _f("version of this schema", SCHEMA_VERSION)

    def __post_init__(self):
        if fault := misfit(self):
            raise RecordError(fault)
        for name in hints(Record):
            value = getattr(self, name)
            if name.endswith(_NEVER_NEGATIVE) and isinstance(value, int | float) and value < 0:
                if name not in ("kernel_workspace_bytes", "preparation_workspace_bytes"):
                    raise RecordError(f"field {name!r} must not be negative, got {shown(value)}")
        for name, allowed in (
            ("status", STATUSES),
            ("source", SOURCES),
            ("device_semantics", SEMANTICS),
            ("train_rest", ("all", "none")),
        ):
            if getattr(self, name) not in allowed:
                got = shown(getattr(self, name))
                raise RecordError(f"field {name!r} must be one of {', '.join(allowed)}, got {got}")
        if self.pairing not in (None, *PAIRINGS):
            got = shown(self.pairing)
            raise RecordError(f"field 'pairing' must be one of {', '.join(PAIRINGS)} or null, got {got}")
        if self.timeline is not None:
            try:
                Timeline.loads(self.timeline, BREAKDOWN)
            except ValueError as error:
                raise RecordError(f"field 'timeline': {error}") from error
        if self.schema_version != SCHEMA_VERSION:
            raise SchemaVersionError(
                f"schema_version {shown(self.schema_version)} is not readable here; this suite reads {SCHEMA_VERSION}"
            )

    @property
    def label(self) -> str:
        """The method with its budget in brackets, as the command line writes it."""
        return self.method if self.budget is None else f"{self.method}[{self.budget}]"

    def to_dict(self) -> dict[str, object]:
        """A flat dictionary in the schema's order, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: object) -> Record:
        """The record that a JSON object holds.

        Raises `RecordError` for anything that is not one, `SchemaVersionError` for one of another version.
        """
        if not isinstance(raw, dict):
            raise RecordError(f"a record must be a JSON object, got {type(raw).__name__}")
        version = raw.get("schema_version")
        if version != SCHEMA_VERSION:
            kind = SchemaVersionError if isinstance(version, int) else RecordError
            raise kind(f"schema_version {shown(version)} is not readable here; this suite reads {SCHEMA_VERSION}")
        unknown = sorted(set(raw) - set(hints(Record)))
        if unknown:
            raise RecordError(f"unknown field {shown(unknown[0])}; the fields are those of reports/record.py")
        missing = [name for name in ("method", "model") if name not in raw]
        if missing:
            raise RecordError(f"a record needs the field {missing[0]!r}")
        return cls(**raw)


def _alternatives(hint: object) -> tuple[type, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def meaning(name: str) -> str:
    """What the field `name` holds, in one line."""
    return Record.__dataclass_fields__[name].metadata["meaning"]


def dumps(records: Iterable[Record]) -> str:
    """The records as a JSON list of flat objects, one record a line."""
    lines = [json.dumps(record.to_dict(), allow_nan=False) for record in records]
    return "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"


def loads(text: str, source: str = "input") -> list[Record]:
    """The records of a JSON list, or of pytest-benchmark's JSON, which carries each in its benchmark's `extra_info`.

    Benchmarks that are not of this suite hold no record and are passed over, unless there is no other. `source` names
    the text in errors. Raises `RecordError`.
    """
    try:
        raw = parse(text, allow_nan=True)
    except ValueError as error:
        raise RecordError(f"{source} cannot be read as JSON ({error}): it may have been cut short") from error
    if isinstance(raw, dict) and "benchmarks" in raw:
        raw = _of_benchmarks(raw["benchmarks"], source)
    if not isinstance(raw, list):
        raise RecordError(
            f"{source} must hold a JSON list of records or pytest-benchmark's JSON, got {type(raw).__name__}"
        )
    records = []
    for position, entry in enumerate(raw):
        try:
            records.append(Record.from_dict(entry))
        except RecordError as error:
            raise type(error)(f"{source}, record {position}: {error}") from error
    return records


def _of_benchmarks(benchmarks: object, source: str) -> list[object]:
    """What the benchmarks of pytest-benchmark's JSON carry that is meant to be a record."""
    if not isinstance(benchmarks, list):
        raise RecordError(f"{source}: the benchmarks must be a JSON list, got {type(benchmarks).__name__}")
    carried = [entry.get("extra_info") if isinstance(entry, dict) else None for entry in benchmarks]
    records = [extra for extra in carried if isinstance(extra, dict) and "schema_version" in extra]
    if benchmarks and not records:
        raise RecordError(f"{source} is pytest-benchmark's JSON, but none of its {len(benchmarks)} benchmarks is ours")
    return records


def read(path: str | os.PathLike) -> list[Record]:
    """The records of a JSON file; raises `RecordError` where it cannot be read."""
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise RecordError(f"cannot read {os.fspath(path)}: {error}") from error
    return loads(text, os.fspath(path))


def write(records: Iterable[Record], path: str | os.PathLike) -> None:
    """Write the records as JSON in one stroke: a reader sees the old file or the new one, never half of it."""
    write_bytes(dumps(records).encode(), path)


def write_bytes(content: bytes, path: str | os.PathLike) -> None:
    """Write `content` to `path` atomically, through a temporary file in the same directory."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def unwritable(path: str | os.PathLike) -> str | None:
    """Why no file can be written at `path`, found out without touching it; None where one can."""
    path = Path(path)
    if path.is_dir():
        return "it is a directory"
    if path.exists() and not path.is_file():
        return "it is not a regular file"  # whose place a file would take
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        return error.strerror
    return None


def to_csv(records: Iterable[Record]) -> str:
    """One tidy table: a row per record, a column per field but the timeline, an empty cell for what is not known."""
    stream = io.StringIO()
    columns = [f.name for f in fields(Record) if f.name != "timeline"]
    writer, quoting = (
        csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n", quoting=quoting)
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
    )
    writer.writeheader()
    for record in records:
        # A NUL has no place in a CSV: readers stop at it, and Python 3.10 refuses to write it.
        row = {k: v.replace("\0", "\ufffd") if isinstance(v, str) else v for k, v in record.to_dict().items()}
        # Python before 3.13 leaves a lone carriage return without quotes, where readers take it for the row's end.
        returns = any("\r" in value for value in row.values() if isinstance(value, str))
        (quoting if returns else writer).writerow(row)
    return stream.getvalue()


def from_csv(text: str) -> list[Record]:
    """The records of `to_csv`'s table, which leaves timelines out. Raises `RecordError`."""
    return [Record.from_dict({k: _parse(k, v) for k, v in row.items()}) for row in csv.DictReader(io.StringIO(text))]


def _parse(name: str, cell: str) -> object:
    if cell is None or name is None:
        raise RecordError("a row of the CSV has more or fewer cells than the header")
    allowed = _alternatives(hints(Record).get(name, str))
    if cell == "" and type(None) in allowed:
        return None
    if bool in allowed and cell in ("True", "False"):
        return cell == "True"
    for kind in (int, float):
        if kind in allowed:
            try:
                return kind(cell)
            except ValueError:
                continue
    return cell
