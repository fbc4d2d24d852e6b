"""What a suite has measured so far, in a file that is complete at every moment: what `--resume` goes on from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.harness.errors import InputError
from benchmarks.harness.spec import RunSpec
from benchmarks.harness.worker import expected_environment
from reports.reading import parse, read_text, shown
from reports.record import Record, RecordError, write_bytes

# A run that ended so would end so again; the others may have met a machine in trouble.
SETTLED = ("ok", "refused")
MOST_SECONDS = 1e9  # a number beyond is no time, and infinity has no JSON


@dataclass(frozen=True)
class Entry:
    """One complete run: its record, and the seconds of a step in each of its rounds."""

    record: Record
    seconds: tuple[float, ...]


class Journal:
    """Complete runs by the benchmark's full name, kept beside the suite's JSON as NAME.partial.json.

    The file has the shape of pytest-benchmark's JSON as far as a report reads it, so that the report of a suite that
    was cut off can be had at once.
    """

    def __init__(self, out: Path):
        self.out = out
        self.path = out.with_name(f"{out.stem}.partial.json")
        self.entries: dict[str, Entry] = {}

    def resume(self) -> None:
        """Take up what an earlier suite left. Raises `InputError` where that cannot be read."""
        # The partial file outlives a suite only where the suite did not end, so it is the newer one.
        for path in (self.path, self.out):
            if path.exists():
                self.entries = _read(path)
                return

    def find(self, fullname: str, spec: RunSpec) -> Entry | None:
        """The settled run of this benchmark under the same configuration and in the same environment."""
        entry = self.entries.get(fullname)
        if entry is not None and entry.record.status in SETTLED and _same(entry, spec):
            return entry
        return None

    def add(self, fullname: str, entry: Entry) -> None:
        """Keep a run, in memory and on disk. Raises OSError where it cannot be written; the file is then as before."""
        self.entries[fullname] = entry
        benchmarks = [
            {"fullname": name, "stats": {"data": list(kept.seconds)}, "extra_info": kept.record.to_dict()}
            for name, kept in self.entries.items()
        ]
        write_bytes(json.dumps({"benchmarks": benchmarks}, allow_nan=False).encode(), self.path)

    def close(self, written: Sequence[str]) -> None:
        """Remove the file if the suite's JSON holds every run that it holds."""
        if set(self.entries) <= set(written):
            self.path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Entry]:
    try:
        raw = parse(read_text(path), allow_nan=True)
        return {
            entry["fullname"]: Entry(Record.from_dict(entry["extra_info"]), _seconds(entry["stats"]["data"]))
            for entry in raw["benchmarks"]
            if "schema_version" in entry["extra_info"]
        }
    except (OSError, ValueError, TypeError, KeyError, RecordError) as error:
        raise InputError(f"--resume: {path} is not a suite's results ({type(error).__name__}: {error})") from error


def _seconds(data: Sequence[object]) -> tuple[float, ...]:
    for value in data:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < MOST_SECONDS:
            raise ValueError(f"{shown(value)} is no time of a step")
    return tuple(map(float, data))


def _same(entry: Entry, spec: RunSpec) -> bool:
    record = entry.record
    asked = spec.configuration()
    # A workload says what it reads where nothing was asked for; that follows from the rest.
    if any(getattr(record, name) != value for name, value in asked.items() if (name, value) != ("data", None)):
        return False
    if record.status == "ok" and record.pairing != "blocks" and record.timed_rounds != spec.rounds:
        return False
    now = expected_environment(spec)
    same = ["commit", "python_version", "torch_version", "platform", "driver", "threads", "allocator"]
    if now["device_name"] is not None:
        same.append("device_name")
    return record.transformers_version in (None, version("transformers")) and all(
        getattr(record, name) == now[name] for name in same
    )
