"""`sparsegrad-bench compare`: files in, a table and an exit code out; the reference made anew where that is asked."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.collect import say
from benchmarks.harness.errors import InputError
from reports import compare_tables
from reports.compare import REGRESSION, Comparison, by_benchmark, compare
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
    thresholds = read_thresholds(arguments.thresholds)
    try:
        new = [record for path in arguments.new for record in read(path)]
        if arguments.update and not arguments.reference.exists():
            return _make(arguments.reference, new)
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
        return _update(arguments.reference, new, comparison, problems)
    return CODES[problems[0]] if problems else 0


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


def _make(path: Path, records: Sequence[Record]) -> int:
    if not by_benchmark(records, "the new results"):
        raise InputError(f"the new results hold no benchmark: {path} would be a reference of nothing")
    _rewrite(path, records)
    say(f"{path} is new: {len(records)} benchmarks")
    return 0


def _update(path: Path, new: Sequence[Record], comparison: Comparison, problems: Sequence[str]) -> int:
    """Make `new` the reference where it has all that the old one has, and under comparable circumstances."""
    if comparison.missing or comparison.incomparable or comparison.lost:
        say(
            f"{path} is as it was: the new results lack some of what it has, or are not comparable; "
            "--environment warn takes another environment, and to begin anew remove the file first"
        )
        return CODES[problems[0]]
    _rewrite(path, new)
    say(f"{path} now holds the new results: {len(new)} benchmarks")
    return 0


def _rewrite(path: Path, records: Sequence[Record]) -> None:
    # Nothing compares a timeline, and a reference is kept under version control.
    write([replace(record, timeline=None) for record in records], path)
