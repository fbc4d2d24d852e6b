"""A comparison with a reference as people and other tools read it: a terminal's table, Markdown, and data for JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

from reports import tables
from reports.compare import IDENTITY, VERDICTS, Benchmark, Comparison, EnvironmentChange, Missing, Move, identify, name
from reports.record import Record, meaning
from reports.thresholds import NEVER_BETTER, PARTS, WORSE_WHERE_SMALLER, Threshold

SCHEMA_VERSION = 1
HEADINGS = ("", "figure", "old", "new", "change", "%", "benchmark")
# A job summary may have 1 MiB: this many lines of each kind stay below a third of it.
MOST_LINES = 300
# What does not stand in Markdown as it is: it becomes a character reference, which is text wherever it stands. A point
# is left alone in numbers only, since www. begins a link, and a colon before a space.
_ACTIVE = re.compile(r"[^\w ,.:;+%/=()—-]|_|(?<!\d)\.|\.(?!\d)|:(?! )")


def text(comparison: Comparison) -> str:
    """What moved, what is missing or new, and the counts, for a terminal."""
    names = _Names(comparison)
    lines = []
    if comparison.moves:
        rows = [
            HEADINGS,
            *([printable(cell) for cell in cells(move, names(move.benchmark))] for move in comparison.moves),
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS) - 1)]
        for row in rows:
            left = [row[i].ljust(widths[i]) for i in (0, 1)]
            right = [row[i].rjust(widths[i]) for i in range(2, len(widths))]
            lines.append("  ".join((*left, *right, row[-1])).rstrip())
        lines.append("")
    lines += [f"{what}: {printable(said)}" for what, said in _remarks(comparison, names)]
    return "\n".join([*lines, summary(comparison)]) + "\n"


def markdown(comparison: Comparison) -> str:
    """The same in GitHub's Markdown, for a job summary or a comment; no name in it can be more than text."""
    names = _Names(comparison)
    lines = [f"**{escaped(summary(comparison))}**", ""]
    if comparison.moves:
        lines += ["| " + " | ".join(HEADINGS) + " |", "|---|---|--:|--:|--:|--:|---|"]
        for move in comparison.moves[:MOST_LINES]:
            lines.append("| " + " | ".join(escaped(cell) for cell in cells(move, names(move.benchmark))) + " |")
        lines += ["", *_more(len(comparison.moves), "figures that moved")]
    remarks = list(_remarks(comparison, names))
    lines += [f"- {escaped(what)}: {escaped(said)}" for what, said in remarks[:MOST_LINES]]
    lines += _more(len(remarks), "remarks")
    return "\n".join(lines).rstrip("\n") + "\n"


def summary(comparison: Comparison) -> str:
    """The counts in a line."""
    found = [(comparison.number(verdict), _PLURALS[verdict]) for verdict in VERDICTS]
    found += [
        (len(comparison.missing), ("benchmark missing", "benchmarks missing")),
        (len(comparison.elsewhere), ("benchmark under other conditions", "benchmarks under other conditions")),
        (len(comparison.added), ("new benchmark", "new benchmarks")),
    ]
    said = [_number(number, *words) for number, words in found if number]
    compared = f"{_number(comparison.benchmarks, 'benchmark', 'benchmarks')} compared"
    compared += f" in {_number(comparison.figures, 'figure', 'figures')}"
    if comparison.environment and comparison.policy == "refuse":
        said.append("the environment changed")
    return f"{compared}: {', '.join(said) or 'nothing moved'}"


def counted(number: int, verdict: str) -> str:
    """So many moves with this verdict, in words."""
    return _number(number, *_PLURALS[verdict])


def data(comparison: Comparison, problems: Sequence[str]) -> dict[str, object]:
    """The comparison as JSON holds it. `problems` are the words of what is wrong, the most pressing first."""
    return {
        "schema_version": SCHEMA_VERSION,
        "problems": list(problems),
        "environment_policy": comparison.policy,
        "benchmarks": comparison.benchmarks,
        "figures": comparison.figures,
        "counts": {verdict: comparison.number(verdict) for verdict in VERDICTS},
        "moves": [
            {
                **_described(move.benchmark),
                "figure": move.figure,
                "old": move.old,
                "new": move.new,
                "change": _plain_number(move.change),
                "share": None if move.share is None else float(move.share),
                "verdict": move.verdict,
                "note": move.note or None,
                "old_interval": move.old_interval,
                "new_interval": move.new_interval,
            }
            for move in comparison.moves
        ],
        "missing": [_missing(each) for each in comparison.missing],
        "under_other_conditions": [_missing(each) for each in comparison.elsewhere],
        "new": [_described(benchmark) for benchmark in comparison.added],
        "environment": [
            {"field": change.field, "old": change.old, "new": change.new, "benchmarks": change.benchmarks}
            for change in comparison.environment
        ],
    }


def smaller_is_better(records: Iterable[Record], thresholds: Mapping[str, Threshold]) -> list[dict[str, object]]:
    """The tracked figures of which less is better, one entry each, as github-action-benchmark reads them.

    Its tool is called customSmallerIsBetter. What a peak consists of is left out, the peak is there. An entry's name
    does not hang on what other benchmarks there are.
    """
    fields = [
        field
        for field, threshold in thresholds.items()
        if threshold.rule != "ignore" and field not in (*NEVER_BETTER, *WORSE_WHERE_SMALLER, *PARTS)
    ]
    entries = []
    for record in records:
        found = [] if record.status != "ok" else [field for field in fields if getattr(record, field) is not None]
        facts = (("commit", record.commit), ("torch", record.torch_version), ("on", record.device_name))
        for field in found:
            entry = {
                "name": printable(f"{name(identify(record))}: {field}"),
                "unit": _unit(field),
                "value": getattr(record, field),
                "extra": "\n".join(
                    [meaning(field), *(f"{what} {printable(fact)}" for what, fact in facts if fact is not None)]
                ),
            }
            ends = [getattr(record, f"{field}_{end}", None) for end in ("low", "high")]
            if None not in ends:
                entry["range"] = f"{ends[0]:.4g} to {ends[1]:.4g}"
            entries.append(entry)
    return entries


def cells(move: Move, benchmark: str) -> tuple[str, ...]:
    """A move as a row under `HEADINGS`; `benchmark` is the name of its benchmark."""
    return (
        move.verdict,
        move.figure,
        value(move.figure, move.old, move.old_interval),
        value(move.figure, move.new, move.new_interval),
        *_change(move),
        benchmark + (f" ({move.note})" if move.note else ""),
    )


def value(figure: str, given: int | float | str | None, interval: tuple[float, float] | None = None) -> str:
    """A figure's value with its unit, and its interval where it has one."""
    if given is None or figure == "status":
        return tables.MISSING if given is None else str(given)
    if isinstance(given, bool):
        return "yes" if given else "no"
    if figure.endswith("_bytes"):
        return f"{tables.mib(given)} MiB"
    if figure.endswith("_s"):
        return f"{tables.milliseconds(given)} ms"
    if isinstance(given, int):
        return tables.count(given)
    said = tables.number(given, decimals=4)
    return said if interval is None else f"{said} ({' to '.join(tables.number(end) for end in interval)})"


def printable(said: str) -> str:
    """The text with an escape for each character that a terminal would act on or cannot show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in said)


def escaped(said: str) -> str:
    """The text with nothing in it that Markdown or HTML would read as more than text."""
    return _ACTIVE.sub(lambda found: f"&#{ord(found[0])};", printable(said))


_PLURALS = {
    "regression": ("regression", "regressions"),
    "not comparable": ("figure not comparable", "figures not comparable"),
    "undecided": ("undecided", "undecided"),
    "change": ("change", "changes"),
    "improvement": ("improvement", "improvements"),
}


class _Names:
    """The names of benchmarks in this company: what all share is left out."""

    def __init__(self, comparison: Comparison):
        self.all = {
            *(move.benchmark for move in comparison.moves),
            *(each.benchmark for each in (*comparison.missing, *comparison.elsewhere)),
            *comparison.added,
        }

    def __call__(self, benchmark: Benchmark) -> str:
        return name(benchmark, self.all)


def _change(move: Move) -> tuple[str, str]:
    """The change in the figure's unit, and as a part of the old figure in per cent."""
    if move.change is None or isinstance(move.new, bool):
        return tables.MISSING, tables.MISSING
    if move.figure.endswith("_s"):
        said = f"{tables.milliseconds(move.change)} ms"
    elif move.change.denominator == 1:
        # To the byte: in MiB most would be told as 0.00.
        said = f"{int(move.change):,}" + " bytes" * move.figure.endswith("_bytes")
    else:
        said = tables.number(move.change, decimals=4)
    return _signed(move.change, said), _signed(move.change, tables.percent(move.share))


def _signed(value: Fraction, said: str) -> str:
    return f"+{said}" if value > 0 and said[0].isdigit() else said


def _remarks(comparison: Comparison, names: _Names) -> Iterable[tuple[str, str]]:
    """What a table of figures does not say."""
    for each in comparison.missing:
        yield "missing", names(each.benchmark) + _instead(each, "; the new results have it with ")
    for each in comparison.elsewhere:
        yield "not comparable", names(each.benchmark) + _instead(each, "; the new results are of ")
    for benchmark in comparison.added:
        yield "new", names(benchmark)
    for change in comparison.environment:
        yield "environment", _environment(change, comparison.policy)


def _instead(each: Missing, beginning: str) -> str:
    if not each.instead:
        return ""
    return beginning + ", ".join(
        f"{field} {tables.plain(new)} instead of {tables.plain(old)}" for field, old, new in each.instead
    )


def _environment(change: EnvironmentChange, policy: str) -> str:
    what = "all figures" if change.everything else "times and what else hangs on the machine"
    said = f"{change.field} was {tables.plain(change.old)} and is {tables.plain(change.new)}"
    said += f" in {_number(change.benchmarks, 'benchmark', 'benchmarks')}, which matters to {what}"
    return said + ("; they are not judged" if policy == "refuse" else "; they are judged all the same")


def _more(number: int, what: str) -> list[str]:
    return [f"... and {number - MOST_LINES:,} more {what}.", ""] if number > MOST_LINES else []


def _missing(each: Missing) -> dict[str, object]:
    return {**_described(each.benchmark), "instead": {field: [old, new] for field, old, new in each.instead}}


def _described(benchmark: Benchmark) -> dict[str, object]:
    return {"name": name(benchmark), "benchmark": dict(zip(IDENTITY, benchmark, strict=True))}


def _unit(field: str) -> str:
    for ending, unit in (("_bytes", "bytes"), ("_params", "parameters"), ("_s", "s"), ("_ratio", "of full's")):
        if field.endswith(ending):
            return unit
    return "times"


def _plain_number(value: Fraction | None) -> int | float | None:
    if value is None:
        return None
    return int(value) if value.denominator == 1 else float(value)


def _number(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
