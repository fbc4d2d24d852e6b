"""`sparsegrad-bench compare`: files in, a table and an exit code out; where that is asked, the reference made anew and
the new results appended to a history."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.collect import say
from benchmarks.harness.errors import InputError
from benchmarks.lock import held
from reports import compare_tables
from reports.compare import REGRESSION, Comparison, by_benchmark, compare
from reports.history import History, Line, is_commit, is_time
from reports.reading import shown
from reports.record import Record, SchemaVersionError, read, unwritable, write, write_bytes
from reports.thresholds import Threshold, read_thresholds

# What is wrong, and the exit code of each: the first that applies. A regression is found in comparable figures alone
# and so is certain; a benchmark is missing whatever the environment is. Whoever lets 4 pass, because the machine
# changes, still sees both.
CODES = {"regression": 1, "missing": 3, "not comparable": 4}
WRITTEN = ("json", "markdown", "smaller_is_better")


def compare_command(arguments: argparse.Namespace) -> int:
    """Compare, write what is asked for, and return the exit code. Raises for bad input."""
    _check_paths(arguments)
    if arguments.history is None:
        if arguments.commit is not None:
            raise InputError("--commit names the commit of --history: give that too, or leave it out")
        return _compare(arguments, None)
    # From here on, so that a second command ends before it has said anything.
    with held(arguments.history, "--history"):
        found = History.read(arguments.history) if arguments.history.exists() else History(arguments.history)
        return _compare(arguments, found)


def _compare(arguments: argparse.Namespace, history: History | None) -> int:
    thresholds = read_thresholds(arguments.thresholds)
    try:
        new = [record for path in arguments.new for record in read(path)]
        append = _nothing if history is None else _growth(history, arguments.commit, new, thresholds)
        if arguments.update and not arguments.reference.exists():
            return _make(arguments.reference, new, append)
        reference = read(arguments.reference)
    except SchemaVersionError as error:
        say(f"not comparable: {error}; make the reference and the new results with the same version of the suite")
        return CODES["not comparable"]
    if not reference:
        raise InputError(f"{arguments.reference} holds no benchmark, so that nothing would be compared")
    comparison = compare(reference, new, thresholds, arguments.environment)
    problems = problems_of(comparison, arguments.fail_on)
    _write(arguments, comparison, problems, new, thresholds)
    if arguments.update:
        return _update(arguments.reference, new, comparison, problems, append)
    append()
    return CODES[problems[0]] if problems else 0


def _nothing() -> None:
    """Append nothing."""


def _growth(
    history: History, commit: str | None, new: Sequence[Record], thresholds: dict[str, Threshold]
) -> Callable[[], None]:
    """What appends the new results to the history, checked now. Raises `InputError` where they have no commit."""
    if not new:
        raise InputError("the new results hold no benchmark, so that --history would get a line of nothing")
    commits = sorted({str(record.commit) for record in new if record.commit is not None})
    if commit is None:
        if len(commits) != 1 or any(record.commit is None for record in new):
            said = " and ".join(map(shown, commits[:2])) or "none"
            raise InputError(f"--history needs results of one commit, and these say {said}: name it with --commit")
        commit = commits[0]
    if not is_commit(commit):
        raise InputError(f"the commit of --history must be a hash or another short name, got {shown(commit)}")
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    when = max((record.created_at for record in new if is_time(record.created_at)), default=now)
    line = Line.of(new, thresholds, commit, when)

    def append() -> None:
        history.append(line)
        say(f"{history.path} has {commit} with {len(line.records)} benchmarks")

    return append


def problems_of(comparison: Comparison, fail_on: str = "regression") -> list[str]:
    """Words of `CODES`, the one whose exit code counts first."""
    worse = bool(comparison.number(REGRESSION))
    if fail_on == "change":
        # What is missing or not comparable has a code of its own.
        worse = worse or bool(comparison.judged or comparison.added)
    found = {"regression": worse, "missing": bool(comparison.missing), "not comparable": comparison.incomparable}
    return [problem for problem in CODES if found[problem]]


def _check_paths(arguments: argparse.Namespace) -> None:
    """Raise `InputError` where an output cannot be written or would destroy something."""
    given = {f"--{option.replace('_', '-')}": getattr(arguments, option) for option in WRITTEN}
    given = {option: path for option, path in given.items() if path is not None}
    if arguments.history is not None:
        given["--history"] = arguments.history
    read_from = [arguments.reference, *arguments.new, *filter(None, [arguments.thresholds])]
    if arguments.update and any(_same(arguments.reference, path) for path in arguments.new):
        raise InputError(f"--update would replace {arguments.reference} with itself: give other results than those")
    seen: list[tuple[str, str]] = []
    for option, path in given.items():
        for other, taken in seen:
            if path == taken or (path != "-" and taken != "-" and _same(Path(path), Path(taken))):
                raise InputError(f"{option} and {other} cannot both go to {path}")
        seen.append((option, path))
        if path == "-":
            continue
        if any(_same(Path(path), source) for source in read_from):
            raise InputError(f"{option} {path} would overwrite what is compared: give another path")
        if reason := unwritable(path):
            raise InputError(f"{option} {path} cannot be written: {reason}")
    if arguments.update and (reason := unwritable(arguments.reference)):
        raise InputError(f"--update cannot write {arguments.reference}: {reason}")


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _write(
    arguments: argparse.Namespace,
    comparison: Comparison,
    problems: Sequence[str],
    new: Sequence[Record],
    thresholds: dict[str, Threshold],
) -> None:
    outputs = {
        "json": lambda: _json(compare_tables.data(comparison, problems)),
        "markdown": lambda: compare_tables.markdown(comparison),
        "smaller_is_better": lambda: _json(compare_tables.smaller_is_better(new, thresholds)),
    }
    to_stdout = compare_tables.text(comparison)
    for option, made in outputs.items():
        path = getattr(arguments, option)
        if path == "-":
            say(to_stdout.rstrip("\n"))
            to_stdout = made()
        elif path is not None:
            write_bytes(made().encode(), path)
    print(to_stdout, end="", flush=True)
    if len(problems) > 1:
        say(f"several problems: {', '.join(problems)}; the exit code is the first one's")


def _json(value: object) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def _make(path: Path, records: Sequence[Record], append: Callable[[], None]) -> int:
    if not by_benchmark(records, "the new results"):
        raise InputError(f"the new results hold no benchmark: {path} would be a reference of nothing")
    append()
    _rewrite(path, records)
    say(f"{path} is new: {len(records)} benchmarks")
    return 0


def _update(
    path: Path,
    new: Sequence[Record],
    comparison: Comparison,
    problems: Sequence[str],
    append: Callable[[], None],
) -> int:
    """Make `new` the reference where it has all that the old one has, and under comparable circumstances."""
    if comparison.missing or comparison.incomparable or comparison.lost:
        say(
            f"{path} is as it was: the new results lack some of what it has, or are not comparable; "
            "--environment warn takes another environment, and to begin anew remove the file first"
        )
        return CODES[problems[0]]
    # Before the reference: killed in between, the same command is given again, and its line supersedes this one.
    append()
    _rewrite(path, new)
    say(f"{path} now holds the new results: {len(new)} benchmarks")
    return 0


def _rewrite(path: Path, records: Sequence[Record]) -> None:
    # Nothing compares a timeline, and a reference is kept under version control.
    write([replace(record, timeline=None) for record in records], path)
