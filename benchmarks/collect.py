"""Records as they come: how each went, on stderr, and the records themselves where they were asked for."""

from __future__ import annotations

import sys
import time
from bisect import bisect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.lock import held
from benchmarks.options import SWEPT
from reports.record import Record, dumps, unwritable, write

if TYPE_CHECKING:
    from benchmarks.harness.spec import RunSpec
    from benchmarks.harness.turns import Done


def say(text: str) -> None:
    """Tell a person; standard output is for records."""
    print(text, file=sys.stderr, flush=True)


def check_destination(path: str) -> None:
    """Raise `InputError` now, not after minutes of measuring, where records cannot be written."""
    from benchmarks.harness.errors import InputError

    if path == "-":
        if sys.stdout is None:
            raise InputError("standard output is closed; give --json PATH")
    elif reason := unwritable(path):
        raise InputError(f"--json {path} cannot be written: {reason}")


def outcome(record: Record) -> str:
    """How it went, in one line."""
    if record.status != "ok":
        return f"{record.status}: {record.reason}"
    step = "" if record.step_time_s is None else f", {record.step_time_s * 1e3:.0f} ms a step"
    if record.step_time_ratio is not None:
        step += f", {record.step_time_ratio:.2f} of full fine-tuning's"
    if record.fits is not None:
        room = f"{record.gpu_memory_bytes / 2**30:.4g} GiB"
        step += f", fits in {room}" if record.fits else f", does NOT fit in {room} ({record.oom_phase})"
    return f"ok, peak {record.peak_step_bytes / 2**20:.1f} MiB{step}"


def collect(
    specs: Sequence[RunSpec],
    how: str,
    obtain: Callable[[Done], None],
    destination: str,
    outcome: Callable[[Record], str] = outcome,
) -> list[Record]:
    """Take records as they come, tell how each went, write them in the order of the specs, and return them."""
    records: list[Record] = []
    places: list[int] = []  # of the records, among the specs
    started = time.monotonic()
    differing = [name for name in SWEPT if len({getattr(spec, name) for spec in specs}) > 1]

    def done(spec: RunSpec, record: Record, _) -> None:
        place = next(i for i, other in enumerate(specs) if other == spec and i not in places)
        at = bisect(places, place)
        places.insert(at, place)
        records.insert(at, record)
        passed = time.monotonic() - started
        name = ", ".join([*(_value(spec, field) for field in differing), record.label])
        say(f"[{len(records)}/{len(specs)}] {name}: {outcome(record)} (after {passed:.0f} s)")
        if destination != "-":
            write(records, destination)

    workloads = ", ".join(dict.fromkeys(spec.label() for spec in specs))
    methods = ", ".join(dict.fromkeys(spec.method_label for spec in specs))
    say(f"{workloads}, train-rest {specs[0].train_rest}, {how}: {methods} ...")
    try:
        with nullcontext() if destination == "-" else held(Path(destination), "--json"):
            obtain(done)
    finally:
        # Also when interrupted: what is complete is kept.
        if destination == "-":
            sys.stdout.write(dumps(records))
            sys.stdout.flush()
    if destination != "-":
        say(f"{len(records)} records in {destination}")
    failed = [record.status for record in records if record.status != "ok"]
    if failed:
        say(f"{len(failed)} of {len(records)} runs did not end ok: {', '.join(failed)}")
    return records


def _value(spec: RunSpec, field: str) -> str:
    """What tells a spec from the others, as a person says it."""
    if field in ("model", "layer", "block"):
        return spec.label()
    value = getattr(spec, field)
    return value if field == "dtype" else f"{field.replace('_', '-')} {value}"
