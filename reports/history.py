"""Results over commits: a file that grows by one line with each comparison, and what moved from commit to commit.

A line is a whole measurement: the tracked figures of every benchmark, what it is and what it was taken with, not only
what changed against an earlier line. So a line means the same whatever stands before it, and the others stay true where
one was cut short and is dropped, where one is superseded by another of its commit, and where branches are merged.

Lines stand in the order of commits. Each benchmark of a commit is judged against the same one of the last commit that
had it, by `reports/compare.py`.
"""

from __future__ import annotations

import json
import os
import re
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from reports.compare import IDENTITY, MACHINE, VERSIONS, Benchmark, Move, by_benchmark, compare
from reports.reading import MOST_BYTES, hints, open_file, parse, shown
from reports.record import SCHEMA_VERSION, Record, RecordError
from reports.thresholds import WITH_INTERVAL, Threshold

SCHEMA = 1
# Benchmarks of all lines together: a record takes some two kB of memory, however short it is written.
MOST_MEASUREMENTS = 100_000
COMMIT = re.compile(r"[\w.+/@:-]{1,100}", re.ASCII)
LONGEST_REASON = 300  # characters

# What a line keeps of a record beside its figures: what it is a benchmark of, how it ended, what it was taken with.
_KEPT = (*IDENTITY, "status", "reason", *VERSIONS, *MACHINE)
_ENDS = {figure: (f"{figure}_low", f"{figure}_high") for figure in WITH_INTERVAL}
_KEYS = ("schema", "when", "commit", "figures", "common", "benchmarks")
# How every line begins: a rest without an end that begins otherwise is no line that was cut short.
_BEGINNING = b'{"schema": '
_DEFAULTS = {name: each.default for name, each in Record.__dataclass_fields__.items()}


@dataclass(frozen=True)
class Line:
    """What one comparison appends: `records` hold the `figures` that were tracked then and what `compare` asks for."""

    when: str  # the results' latest time, ISO 8601, UTC
    commit: str
    figures: tuple[str, ...]
    records: tuple[Record, ...]

    @classmethod
    def of(cls, records: Sequence[Record], thresholds: Mapping[str, Threshold], commit: str, when: str) -> Line:
        """The line of new results. Raises `RecordError` for a benchmark that is there twice."""
        figures = tuple(name for name, threshold in thresholds.items() if threshold.rule != "ignore")
        kept = [_reduced(record, figures) for record in by_benchmark(records, "the new results").values()]
        return cls(when, commit, figures, tuple(kept))

    def dumps(self) -> str:
        """The line as JSON: what all records share stands once, and what is as `Record` has it nowhere."""
        rows = [_unlike_default(record) for record in self.records]
        common = {name: value for name, value in rows[0].items() if all(row.get(name) == value for row in rows)}
        line = {
            "schema": SCHEMA,
            "when": self.when,
            "commit": self.commit,
            "figures": list(self.figures),
            "common": {"schema_version": SCHEMA_VERSION, **common},
            "benchmarks": [{name: value for name, value in row.items() if name not in common} for row in rows],
        }
        return json.dumps(line, allow_nan=False)

    @classmethod
    def loads(cls, text: str) -> Line:
        """What `dumps` wrote. Raises ValueError, of which `RecordError` is one."""
        raw = parse(text)
        if not isinstance(raw, dict):
            raise ValueError(f"a line must be a JSON object, got {type(raw).__name__}")
        if raw.get("schema") != SCHEMA:
            raise ValueError(f"schema {shown(raw.get('schema'))} is not readable here; this version reads {SCHEMA}")
        if set(raw) != set(_KEYS):
            raise ValueError(f"a line has the keys {', '.join(_KEYS)}, got {shown(sorted(raw))}")
        when, commit, figures = raw["when"], raw["commit"], raw["figures"]
        if not is_time(when):
            raise ValueError(f"when must be a time as ISO 8601 has it, got {shown(when)}")
        if not is_commit(commit):
            raise ValueError(f"commit must be a commit's name, got {shown(commit)}")
        if not isinstance(figures, list) or not all(isinstance(name, str) and _is_figure(name) for name in figures):
            raise ValueError(f"figures must be a list of a record's figures, got {shown(figures)}")
        return cls(when, commit, tuple(figures), tuple(_records(raw["common"], raw["benchmarks"], figures)))


class History:
    """The lines of a history's file, and the file's growth."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.lines: list[Line] = []
        self._complete = 0  # bytes

    @classmethod
    def read(cls, path: str | os.PathLike) -> History:
        """The history that a file holds; a last line that was cut short is left out. Raises `RecordError`."""
        history = cls(path)
        try:
            *lines, rest = _content(path).split(b"\n")
        except (OSError, ValueError) as error:
            raise RecordError(f"cannot read the history {os.fspath(path)}: {error}") from error
        measurements = 0
        for number, line in enumerate(lines, start=1):
            try:
                history.lines.append(Line.loads(line.decode("utf-8")))
                measurements += len(history.lines[-1].records)
                _check_number(measurements)
            except ValueError as error:
                raise RecordError(f"{os.fspath(path)}, line {number}, is not of a history: {error}") from error
            history._complete += len(line) + 1
        if not (rest.startswith(_BEGINNING) or _BEGINNING.startswith(rest)):
            raise RecordError(f"{os.fspath(path)}, line {len(lines) + 1}, is not of a history, and has no end")
        return history

    def append(self, line: Line) -> None:
        """Write a line behind the others, in place of one that was cut short.

        Raises `RecordError` where the file would be too large to be read, OSError where it cannot be written.
        """
        content = line.dumps().encode() + b"\n"
        try:
            _check_number(sum(len(each.records) for each in (*self.lines, line)))
            if self._complete + len(content) > MOST_BYTES:
                raise ValueError(f"it would have more than {MOST_BYTES // 2**20} MiB; begin a new one")
        except ValueError as error:
            raise RecordError(f"nothing was appended to the history {self.path}: {error}") from error
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.truncate(self._complete)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)
        self._complete += len(content)


def is_commit(name: object) -> bool:
    """Whether a history takes it for the name of a commit: a hash, with -dirty behind it or not, a tag or a branch."""
    return isinstance(name, str) and COMMIT.fullmatch(name) is not None


def is_hash(commit: str) -> bool:
    """Whether the name of a commit is its hash, with -dirty behind it or not."""
    return re.fullmatch(r"[0-9a-f]{7,64}(-dirty)?", commit) is not None


def _is_figure(name: str) -> bool:
    """Whether a field of a record is a number, and not one of those that say what it is a record of."""
    kinds = typing.get_args(hints(Record).get(name))
    return (int in kinds or float in kinds or bool in kinds) and str not in kinds and name not in _KEPT


def is_time(when: object) -> bool:
    """Whether it is a date and time as a history and records have it, ISO 8601."""
    try:
        return isinstance(when, str) and datetime.fromisoformat(when).isoformat() == when
    except ValueError:
        return False


def _content(path: str | os.PathLike) -> bytes:
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > MOST_BYTES else file.read(MOST_BYTES + 1)
    if max(size, len(content)) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES // 2**20} MiB; begin a new one")
    return content


def _check_number(measurements: int) -> None:
    if measurements > MOST_MEASUREMENTS:
        raise ValueError(f"more than {MOST_MEASUREMENTS:,} benchmarks in all lines together; begin a new one")


def _fields(figures: Iterable[str]) -> set[str]:
    """What a line keeps of a record."""
    figures = set(figures)
    return {*_KEPT, *figures, *(end for figure, ends in _ENDS.items() if figure in figures for end in ends)}


def _reduced(record: Record, figures: Sequence[str]) -> Record:
    kept = {name: getattr(record, name) for name in _fields(figures)}
    reason = None if record.status == "ok" or record.reason is None else record.reason[:LONGEST_REASON]
    return Record(**{**kept, "reason": reason})


def _unlike_default(record: Record) -> dict[str, object]:
    return {name: value for name, value in record.to_dict().items() if value != _DEFAULTS[name]}


def _records(common: object, rows: object, figures: Sequence[str]) -> list[Record]:
    if not isinstance(common, dict) or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("common must be an object, and benchmarks a list of objects")
    if not rows:
        raise ValueError("it holds no benchmark")
    _check_number(len(rows))
    if unknown := sorted({*common, *(name for row in rows for name in row)} - _fields(figures) - {"schema_version"}):
        raise ValueError(f"a benchmark has no field {shown(unknown[0])} here")
    records = [Record.from_dict({**common, **row}) for row in rows]
    by_benchmark(records, "benchmarks")
    return records


# --- what moved


@dataclass(frozen=True)
class Result:
    """One benchmark at one commit, with the figures that were tracked then."""

    record: Record
    figures: frozenset[str]


@dataclass(frozen=True)
class Entry:
    """All results of one commit."""

    commit: str
    when: str
    results: Mapping[Benchmark, Result]


@dataclass(frozen=True)
class CommitMove:
    """A move, the place of the commit at which it was seen, and that of the one it was compared with."""

    position: int
    since: int
    move: Move

    @property
    def by_the_commit(self) -> bool:
        """Whether nothing but this one commit stands between the two figures."""
        return self.since == self.position - 1 and not self.move.environment


@dataclass(frozen=True)
class Presence:
    """That the results of a commit have a benchmark which those of the commit before lack, or the other way round."""

    position: int
    benchmark: Benchmark
    what: str


@dataclass(frozen=True)
class Series:
    """One figure of one benchmark over all commits: None where it was not obtained."""

    benchmark: Benchmark
    figure: str
    values: tuple[int | float | None, ...]
    intervals: tuple[tuple[float, float] | None, ...]
    moves: tuple[CommitMove, ...]


@dataclass(frozen=True)
class Trend:
    """What became of all figures over the commits; moves are in the order of commits, the most severe of each first."""

    entries: tuple[Entry, ...]
    moves: tuple[CommitMove, ...]
    presences: tuple[Presence, ...]
    moved: tuple[Series, ...]
    figures: int  # of all benchmarks, obtained at least once
    benchmarks: tuple[Benchmark, ...]

    @classmethod
    def of(cls, lines: Iterable[Line], thresholds: Mapping[str, Threshold]) -> Trend:
        """Judge each commit by the thresholds of `read_thresholds`."""
        entries = by_commit(lines)
        tracks: dict[Benchmark, _Track] = {}
        moves: list[CommitMove] = []
        presences: list[Presence] = []
        for position, entry in enumerate(entries):
            if position:
                presences += _presences(position, entries[position - 1].results, entry.results, tracks)
            found = []
            for benchmark, result in entry.results.items():
                track = tracks.setdefault(benchmark, _Track(thresholds))
                found += track.take(position, result)
            moves += sorted(found, key=lambda each: each.move.severity)
        drawn: dict[tuple[Benchmark, str], list[CommitMove]] = {}
        for each in moves:
            if each.move.figure != "status":
                drawn.setdefault((each.move.benchmark, each.move.figure), []).append(each)
        tracked = [name for name, threshold in thresholds.items() if threshold.rule != "ignore"]
        return cls(
            tuple(entries),
            tuple(moves),
            tuple(presences),
            tuple(_series(entries, *which, tuple(of)) for which, of in drawn.items()),
            len(set(_obtained(entries, tracked))),
            tuple(tracks),
        )


def by_commit(lines: Iterable[Line]) -> list[Entry]:
    """The lines' commits, each where it first stands; what was measured twice at one counts as it was last measured."""
    found: dict[str, Entry] = {}
    for line in lines:
        earlier = found[line.commit].results if line.commit in found else {}
        results = {
            benchmark: Result(record, frozenset(line.figures))
            for benchmark, record in by_benchmark(line.records, "a line of the history").items()
        }
        found[line.commit] = Entry(line.commit, line.when, {**earlier, **results})
    return list(found.values())


@dataclass
class _Track:
    """What is known of one benchmark on the way through the commits.

    `known` holds figures that count as they are: those of the last run that ended ok, but of what moved within its
    tolerance the earlier one, so that many small steps are not lost; `known_at` says of which commit each is.
    """

    thresholds: Mapping[str, Threshold]
    last: Result | None = None
    last_at: int = 0
    known: Result | None = None
    known_at: dict[str, int] = field(default_factory=dict)

    def take(self, position: int, result: Result) -> list[CommitMove]:
        """The moves of the benchmark at the commit of this place."""
        moves, held = [], {}
        if self.last is not None:
            found, held = self._compare(self.last, result)
            moves += [CommitMove(position, self.last_at, move) for move in found]
        if self.known is not None and self.known is not self.last and result.record.status == "ok":
            told = {each.move.figure for each in moves}
            found, held = self._compare(self.known, result)
            found = [move for move in found if move.figure not in told]
            moves += [CommitMove(position, self.known_at[move.figure], move) for move in found]
            held = {figure: old for figure, old in held.items() if figure not in told}
        self.last, self.last_at = result, position
        if result.record.status == "ok":
            kept = {name: value for values in held.values() for name, value in values.items()}
            self.known = Result(replace(result.record, **kept), result.figures) if kept else result
            self.known_at = {name: self.known_at[name] if name in held else position for name in result.figures}
        return moves

    def _compare(self, old: Result, new: Result) -> tuple[Sequence[Move], dict[str, dict[str, object]]]:
        """What moved, and of what moved within its bounds alone the old values by figure."""
        both = old.figures & new.figures
        thresholds = {name: threshold for name, threshold in self.thresholds.items() if name in both}
        found = compare([old.record], [new.record], thresholds)
        held: dict[str, dict[str, object]] = {}
        # In another environment the figures begin anew.
        if not found.environment and old.record.status == new.record.status == "ok":
            moved = {move.figure for move in found.moves}
            for name, threshold in thresholds.items():
                values = getattr(old.record, name), getattr(new.record, name)
                if threshold.rule != "ignore" and name not in moved and None not in values and values[0] != values[1]:
                    held[name] = {each: getattr(old.record, each) for each in (name, *_ENDS.get(name, ()))}
        return found.moves, held


def _presences(
    position: int, before: Collection[Benchmark], now: Collection[Benchmark], ever: Collection[Benchmark]
) -> list[Presence]:
    came = [Presence(position, each, "measured again" if each in ever else "new") for each in now if each not in before]
    return came + [Presence(position, each, "not measured") for each in before if each not in now]


def _obtained(entries: Iterable[Entry], tracked: Sequence[str]) -> Iterable[tuple[Benchmark, str]]:
    for entry in entries:
        for benchmark, result in entry.results.items():
            for name in tracked:
                if getattr(result.record, name) is not None:
                    yield benchmark, name


def _series(entries: Sequence[Entry], benchmark: Benchmark, figure: str, moves: tuple[CommitMove, ...]) -> Series:
    records = [entry.results[benchmark].record if benchmark in entry.results else None for entry in entries]
    # A run that did not end ok has figures of no steady state.
    records = [record if record is not None and record.status == "ok" else None for record in records]

    def values(name: str) -> list[int | float | None]:
        return [None if record is None else getattr(record, name) for record in records]

    ends = zip(*map(values, _ENDS[figure]), strict=True) if figure in _ENDS else [(None, None)] * len(records)
    return Series(
        benchmark, figure, tuple(values(figure)), tuple(None if None in pair else pair for pair in ends), moves
    )
