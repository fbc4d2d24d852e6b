"""What the benchmarks have in common: how one run goes through pytest-benchmark's fixture and where its record goes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from baselines.method import MethodError
from benchmarks import matrix
from benchmarks.harness.environment import environment
from benchmarks.harness.errors import InputError
from benchmarks.harness.pairing import Reference
from benchmarks.harness.plan import plan
from benchmarks.harness.spec import RunSpec
from benchmarks.harness.turns import SPAN_S, measure_all
from benchmarks.journal import Entry, Journal
from reports import tables
from reports.record import Record, write_bytes

# Defects of the code, where the other statuses tell what a machine can or cannot do.
DEFECTS = ("crashed", "diverged")
STABLE = ("device_name", "platform", "python_version", "torch_version", "threads")


class StepClock:
    """A timer that stands still except while a step runs, by the step's own worker's clock.

    pytest-benchmark asks it before and after a round, and so has the worker's seconds (events on a GPU) in its
    statistics, not those of the pipe to it.
    """

    def __init__(self):
        self._now = 0.0

    def now(self) -> float:
        """Seconds of steps so far."""
        return self._now

    def advance(self, seconds: float) -> None:
        """A step took this long."""
        self._now += seconds


@dataclass(frozen=True)
class Case:
    """A selected benchmark: its method, and the conditions that it shares with those it is timed in turns with."""

    fullname: str
    method: str
    conditions: Mapping[str, object]


@dataclass
class Suite:
    """One session's benchmarks.

    The first benchmark of a case measures all selected methods on it, since these are timed in turns; pytest-benchmark
    is then given each one's rounds as it comes to it.
    """

    rounds: int | None  # None: the case's own
    threads: int
    device: str
    time_limit_s: float
    span_s: float = SPAN_S
    journal: Journal | None = None
    selected: list[Case] = field(default_factory=list)
    clock: StepClock = field(default_factory=StepClock)
    records: list[tuple[str, Record]] = field(default_factory=list)
    problem: str | None = None
    replayed: int = 0

    def __post_init__(self):
        self.reference = Reference(self.time_limit_s)
        self._measured: dict[str, Entry] = {}

    def spec(self, method: str, **case: object) -> RunSpec:
        """The run of a case of the matrix: every method at the budget of the reference on that case."""
        rounds = matrix.rounds(case)
        if "model" in case:
            workload = dict(zip(("batch", "seq"), matrix.MODELS[case["model"]], strict=True))
            workload["calibration_steps"] = matrix.MODEL_CALIBRATION_STEPS
        else:
            workload = {
                "batch": matrix.SHAPE_BATCH,
                "seq": case.pop("tokens") // matrix.SHAPE_BATCH,
                "calibration_steps": matrix.SHAPE_CALIBRATION_STEPS,
            }
        for kind in ("layer", "block"):
            if kind in case:
                d_in, d_out = case[kind].split("x")
                case[kind] = (int(d_in), int(d_out))
        (spec,) = plan(
            method,
            matrix.EQUAL_TRAINABLE,
            **case,
            **workload,
            rounds=self.rounds or rounds,
            threads=self.threads,
            device=self.device,
            optimizer_impl="foreach" if self.device == "cuda" else "for-loop",
        )
        return spec

    def measure(self, benchmark, method: str, **case: object) -> Record:
        """One run through pytest-benchmark's fixture; whatever befalls it, its record is in `extra_info`."""
        spec = self.spec(method, **case)
        benchmark.group = f"{spec.label()}, {spec.batch} x {spec.seq}, {spec.dtype}, train-rest {spec.train_rest}"
        try:
            entry = self._entry(Case(benchmark.fullname, method, case), spec)
            rounds = iter(entry.seconds)
            benchmark.pedantic(
                lambda: self.clock.advance(next(rounds, 0.0)), rounds=max(1, len(entry.seconds)), iterations=1
            )
        except BaseException:
            # Not only Exception: an interrupted benchmark has no record, and must not be in the JSON without one.
            benchmark.has_error = True
            raise
        record = entry.record
        # Filled, not assigned: pytest-benchmark holds on to this very dictionary.
        benchmark.extra_info.update(record.to_dict())
        if record.status != "ok" and benchmark.stats is not None:
            # What pytest-benchmark timed is no step; see `with_failures`.
            benchmark.stats.stats.data.clear()
            benchmark.has_error = True
        self.records.append((benchmark.group, record))
        return record

    def _entry(self, case: Case, spec: RunSpec) -> Entry:
        """The benchmark's run: one that is measured already, or measured now in turns with the others of its case."""
        if case.fullname in self._measured:
            return self._measured[case.fullname]
        if kept := self._kept(case, spec):
            self.replayed += 1
            return kept
        wanted = {spec: [case.fullname]}
        for other in self.selected:
            if other.conditions == case.conditions and other.fullname not in {case.fullname, *self._measured}:
                try:
                    its_spec = self.spec(other.method, **other.conditions)
                except (InputError, MethodError):
                    continue  # its own benchmark says so
                if not self._kept(other, its_spec):
                    wanted.setdefault(its_spec, []).append(other.fullname)
        measure_all(
            list(wanted),
            self.reference,
            lambda spec, record, seconds: self._add(wanted[spec], Entry(record, tuple(seconds))),
            self.time_limit_s,
            self.span_s,
        )
        return self._measured[case.fullname]

    def _kept(self, case: Case, spec: RunSpec) -> Entry | None:
        return self.journal.find(case.fullname, spec) if self.journal else None

    def _add(self, fullnames: Sequence[str], entry: Entry) -> None:
        for fullname in fullnames:
            self._measured[fullname] = entry
            if self.journal is not None:
                self._keep(fullname, entry)

    def _keep(self, fullname: str, entry: Entry) -> None:
        try:
            self.journal.add(fullname, entry)
        except OSError as error:
            pytest.exit(
                f"{self.journal.path} cannot be written ({error.strerror}); what it holds is complete: "
                "make room and run again with --resume",
                returncode=pytest.ExitCode.INTERRUPTED,
            )

    def save(self, output: dict) -> None:
        """Write pytest-benchmark's JSON in one stroke, then let go of the partial file."""
        try:
            write_bytes(json.dumps(output, indent=1, default=str).encode(), self.journal.out)
        except OSError as error:
            kept = f"; the records are in {self.journal.path}: make room and run again with --resume"
            self.problem = f"{self.journal.out} cannot be written ({error.strerror}){kept * self.journal.path.exists()}"
        else:
            self.journal.close([entry["fullname"] for entry in output["benchmarks"]])

    def left_in_journal(self) -> str | None:
        """A line about runs that are complete and in no other file, where there are such."""
        if self.problem or self.journal is None or not self.journal.path.exists():
            return None
        return f"{len(self.journal.entries)} complete runs are in {self.journal.path}: run again with --resume"

    def machine_info(self) -> dict[str, object]:
        """What tells machines apart that differ, and nothing that changes from run to run."""
        known = environment(self.device)
        return {name: known[name] for name in STABLE} | {"threads": self.threads, "device": self.device}

    def summary(self) -> list[str]:
        """The records as lines for a terminal."""
        if not self.records:
            return []
        rows = [("method [budget]", "peak, MiB", "resident, MiB", "step, ms", "step / full's", "status")]
        lines, group = [], None
        for case, record in self.records:
            if case != group:
                rows.append((case, "", "", "", "", ""))
                group = case
            rows.append(
                (
                    f"  {record.label}",
                    tables.mib(record.peak_step_bytes),
                    tables.mib(record.resident_bytes),
                    tables.milliseconds(record.step_time_s),
                    tables.time_ratio(record),
                    record.status,
                )
            )
        # A case's own line is wider than its column and has no others.
        widths = [max(len(row[i]) for row in rows if any(row[1:])) for i in range(len(rows[0]))]
        for name, *numbers, status in rows:
            cells = [f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:-1], strict=True)]
            lines.append("  ".join((f"{name:<{widths[0]}}", *cells, status)).rstrip())
        return lines


def with_failures(benchmarks: list, written: list[dict]) -> list[dict]:
    """The benchmarks of the JSON, in their order, with those whose run did not end ok.

    pytest-benchmark leaves out what has an error. These have a record that says why there are no figures, and
    statistics that were not obtained: null, not the time that it took to fail.
    """
    known = {entry["fullname"]: entry for entry in written}
    entries = []
    for benchmark in benchmarks:
        if benchmark.fullname in known:
            entries.append(known[benchmark.fullname])
        elif "schema_version" in benchmark.extra_info:
            missing = dict.fromkeys(benchmark.stats.fields)
            entries.append(
                {**benchmark.as_dict(stats=False), "stats": {**missing, "rounds": 0, "data": [], "iterations": 1}}
            )
    return entries
