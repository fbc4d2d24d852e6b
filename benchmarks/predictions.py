"""The commands that predict: `predict`, with its sweeps and searches, and `equal-memory`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from benchmarks.collect import check_destination, collect, outcome, say
from benchmarks.harness.budget import equal_memory
from benchmarks.harness.errors import InputError
from benchmarks.harness.fit import MOST, largest_that_fits
from benchmarks.harness.plan import plan, plan_equal_memory
from benchmarks.harness.predict import predict
from benchmarks.harness.spec import RunSpec
from benchmarks.harness.turns import Done
from benchmarks.options import combinations, fields, single
from reports import tables
from reports.record import Record


def predict_command(arguments: argparse.Namespace) -> None:
    """Predict every method under every combination of options; with --max, the largest batch or sequence of each."""
    specs = predict_specs(arguments)
    check_destination(arguments.json)
    what = arguments.max

    def obtain(done: Done) -> None:
        for spec in specs:
            done(spec, predict(spec) if what is None else _largest(spec, what), ())

    if what is None:
        records = collect(specs, "predicted", obtain, arguments.json)
        if len(records) > 1:
            say("\n".join(_ranking(records)))
    else:
        collect(specs, f"the largest {what}", obtain, arguments.json, lambda record: _largest_outcome(record, what))


def equal_memory_command(arguments: argparse.Namespace) -> None:
    """Predict every method with the largest budget whose metric is no more than the reference's."""
    metric = arguments.metric
    reference, specs, largest = plan_equal_memory(
        arguments.methods, arguments.reference, metric, **_fields(single(arguments))
    )
    check_destination(arguments.json)
    say(f"{reference.label()}, train-rest {reference.train_rest}, the reference {reference.method_label} ...")
    expected = predict(reference)
    if expected.status != "ok":
        raise InputError(f"nothing can be matched to {expected.label}: {expected.status}, {expected.reason}")
    limit = getattr(expected, metric)
    say(f"  {expected.label}: {_size(expected, metric)} of {metric}")

    def matched(spec: RunSpec) -> Record:
        def tried(budget: int) -> Record:
            record = predict(replace(spec, budget=budget))
            say(f"  {record.label}: {_size(record, metric)}")
            return record

        return equal_memory(tried, metric, limit, largest[spec.method])

    def obtain(done: Done) -> None:
        for spec in specs:
            record = expected if spec == reference else matched(spec) if spec.matched is None else predict(spec)
            done(spec, record, ())

    def matching(record: Record) -> str:
        return f"{_size(record, metric)}, {tables.matching(record)}" if record.status == "ok" else outcome(record)

    records = collect(specs, f"matched to {expected.label} in {metric}", obtain, arguments.json, matching)
    others = records[1:] if specs[0] == reference else records
    say("\n".join(_table([expected, *others], metric)))


def predict_specs(arguments: argparse.Namespace) -> list[RunSpec]:
    """The predictions that a command line asks for, checked as far as no model is needed. Raises for bad input."""
    if arguments.max is not None:
        if arguments.gpu_memory is None:
            raise InputError(f"--max {arguments.max} needs to know the card's memory: give --gpu-memory, such as 24GiB")
        if len(getattr(arguments, arguments.max)) > 1:
            raise InputError(f"--max {arguments.max} starts from one value of --{arguments.max}, got several")
    if arguments.model == (None,) and len(arguments.attention) > 1:
        raise InputError("several values of --attention go with --model: a layer or block has no attention")
    # All of them before the first is predicted: a table is not begun with an error in it.
    return list(
        chain.from_iterable(plan(one.methods, one.equal_trainable, **_fields(one)) for one in combinations(arguments))
    )


def _fields(one: argparse.Namespace) -> dict[str, object]:
    return fields(one, device=one.device, rounds=0, gpu_memory_bytes=one.gpu_memory)


def _largest(spec: RunSpec, what: str) -> Record:
    """The record of the largest batch or seq that fits, with a line for each that was tried."""

    def tried(number: int) -> Record:
        record = predict(replace(spec, **{what: number}))
        say(f"  {record.label}, {what} {number}: {outcome(record)}")
        return record

    return largest_that_fits(tried, getattr(spec, what), _most(spec, what))


def _most(spec: RunSpec, what: str) -> int:
    longest = spec.workload().longest_seq if what == "seq" else None
    return longest or MOST[what]


def _largest_outcome(record: Record, what: str) -> str:
    number = getattr(record, what)
    if record.status != "ok":
        return f"{what} {number}: {outcome(record)}"
    return f"largest {what} {number if record.fits else 'none, not even 1'}: {outcome(record)}"


def _size(record: Record, metric: str) -> str:
    return f"{tables.mib(getattr(record, metric))} MiB" if record.status == "ok" else tables.status(record)


def _table(records: Sequence[Record], metric: str) -> list[str]:
    """The matched budgets as lines for a terminal; the reference is the first of `records`."""
    rows = [("method", "budget", "budget_params", f"{metric}, MiB", f"to {records[0].label}'s", "")]
    for record in records:
        share = tables.ratio(getattr(record, metric), getattr(records[0], metric))
        remark = tables.matching(record) if record.status == "ok" else tables.status(record)
        rows.append(
            (
                record.method,
                tables.plain(record.budget),
                tables.count(record.budget_params),
                tables.mib(getattr(record, metric)),
                tables.number(share, decimals=4),
                remark if record is not records[0] else "the reference",
            )
        )
    return _aligned(rows)


def _ranking(records: Sequence[Record]) -> list[str]:
    """The methods under each workload as lines for a terminal, the smallest peak first, without one last."""
    rows = [("method", "peak of a step, MiB", "resident, MiB", "preparation, MiB", "trainable", "")]
    several = len(set(map(_conditions, records))) > 1
    for record in sorted(records, key=lambda one: one.peak_step_bytes or math.inf):
        sizes = (record.peak_step_bytes, record.resident_bytes, record.peak_preparation_bytes)
        remark = tables.status(record) if record.status != "ok" else _conditions(record) if several else ""
        rows.append((record.label, *map(tables.mib, sizes), tables.count(record.trainable_params), remark))
    return _aligned(rows)


def _conditions(record: Record) -> str:
    return f"{record.model}, {record.batch} x {record.seq}, {record.dtype}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of rows whose first and last cells are words, and whose others are figures."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells, last in rows:
        figures = (cell.rjust(width) for cell, width in zip(cells, widths[1:-1], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *figures, last]).rstrip())
    return lines
