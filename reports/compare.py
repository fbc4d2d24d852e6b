"""New records against those of a reference, figure by figure: what got worse, what got better, what is missing.

Benchmarks are matched by what they are (`IDENTITY`), not by their place. Times are compared as ratios to full
fine-tuning with their intervals, bytes and counts as they are; `reports/thresholds.py` says how far each may move.

Figures taken under circumstances that matter to them and differ are not comparable (`ENVIRONMENTS` says what is made
of that). What matters: to every figure the versions of torch and of transformers; to times, and whatever else hangs on
the machine, also the processor or GPU with its driver, the platform, the threads and the allocator; to every figure
that was measured on a GPU all of them. A build tag such as +cpu behind torch's version matters on a GPU alone. The
commit never does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from reports.record import Record, RecordError
from reports.thresholds import NEVER_BETTER, OF_THE_MACHINE, PARTS, WORSE_WHERE_SMALLER, Threshold

# What a benchmark is: two records that share these are the same one.
IDENTITY = (
    "method",
    "budget",
    "model",
    "batch",
    "seq",
    "dtype",
    "source",
    "device_semantics",
    "gpu",
    "gpu_memory_bytes",
    "train_rest",
    "targets",
    "data",
    "adapter_dtype",
    "attention",
    "optimizer",
    "optimizer_impl",
    "checkpointing",
    "accumulate",
    "calibration_steps",
    "lr",
    "seed",
    "equal_trainable",
    "equal_memory",
)
# Where nothing else differs, two records are of the same benchmark under conditions that are not comparable. The
# last three follow from the first two by default.
CONDITIONS = ("source", "device_semantics", "gpu", "gpu_memory_bytes", "optimizer_impl")
VERSIONS = ("torch_version", "transformers_version")
MACHINE = ("device_name", "driver", "platform", "threads", "allocator")
# refuse: figures whose environment changed are not judged; warn: they are, and it is said; ignore: they are.
ENVIRONMENTS = ("refuse", "warn", "ignore")

REGRESSION, IMPROVEMENT, CHANGE = "regression", "improvement", "change"
UNDECIDED, INCOMPARABLE = "undecided", "not comparable"
# The most severe first.
VERDICTS = (REGRESSION, INCOMPARABLE, UNDECIDED, CHANGE, IMPROVEMENT)

Benchmark = tuple[object, ...]


@dataclass(frozen=True)
class Move:
    """One figure of one benchmark that moved beyond its threshold; None where it was not obtained.

    `old` and `new` are words where the figure is `status`.
    """

    benchmark: Benchmark
    figure: str
    old: int | float | str | None
    new: int | float | str | None
    verdict: str
    note: str = ""
    old_interval: tuple[float, float] | None = None
    new_interval: tuple[float, float] | None = None
    # What changed of the environment that matters to the figure: field, old, new.
    environment: tuple[tuple[str, object, object], ...] = ()

    @property
    def change(self) -> Fraction | None:
        """The new figure less the old one, exactly."""
        if None in (self.old, self.new) or self.figure == "status":
            return None
        return Fraction(self.new) - Fraction(self.old)

    @property
    def share(self) -> Fraction | None:
        """The change as a part of the old figure; None where there is none, or the old one is 0."""
        return None if self.change is None or not self.old else self.change / abs(Fraction(self.old))

    @property
    def severity(self) -> tuple[int, int, float]:
        """What tables are sorted by: the verdict; lost runs and lost figures before others; the size of the change."""
        lost = 0 if self.figure == "status" else 1 if self.new is None else 2
        size = math.inf if self.share is None else float(min(abs(self.share), 10**9))
        return (VERDICTS.index(self.verdict), lost, -size)


@dataclass(frozen=True)
class EnvironmentChange:
    """A field of the environment that matters and differs, in how many benchmarks, and whether to all their figures."""

    field: str
    old: object
    new: object
    benchmarks: int
    everything: bool


@dataclass(frozen=True)
class Missing:
    """A benchmark of the reference that the new records lack; `instead` names what a new one has otherwise."""

    benchmark: Benchmark
    instead: tuple[tuple[str, object, object], ...] = ()  # field, old, new


@dataclass(frozen=True)
class Comparison:
    """What became of the reference's benchmarks. `moves` are sorted, the most severe first."""

    moves: tuple[Move, ...]
    missing: tuple[Missing, ...]
    elsewhere: tuple[Missing, ...]  # whose conditions are not comparable
    added: tuple[Benchmark, ...]
    environment: tuple[EnvironmentChange, ...]
    policy: str
    benchmarks: int  # that both have
    figures: int  # compared in them

    def number(self, verdict: str) -> int:
        """How many moves have the verdict."""
        return sum(move.verdict == verdict for move in self.moves)

    @property
    def incomparable(self) -> bool:
        """Whether something could not be compared that had to be."""
        return bool(self.elsewhere) or (self.policy == "refuse" and bool(self.environment))

    @property
    def judged(self) -> tuple[Move, ...]:
        """The moves of figures that could be compared, for the better too."""
        return tuple(move for move in self.moves if move.verdict not in (UNDECIDED, INCOMPARABLE))

    @property
    def lost(self) -> tuple[Move, ...]:
        """Runs that no longer end ok, and figures that are no longer obtained."""
        return tuple(
            move for move in self.moves if move.verdict == REGRESSION and (move.figure == "status" or move.new is None)
        )


def compare(
    reference: Sequence[Record], new: Sequence[Record], thresholds: Mapping[str, Threshold], policy: str = "refuse"
) -> Comparison:
    """Compare `new` with `reference`, by the thresholds of `read_thresholds`; `policy` is one of `ENVIRONMENTS`.

    Raises `RecordError` for a benchmark that one of the two has twice.
    """
    before, after = by_benchmark(reference, "the reference"), by_benchmark(new, "the new results")
    moves: list[Move] = []
    changes: Counter[tuple[str, object, object, bool]] = Counter()
    figures = 0
    for benchmark in [benchmark for benchmark in before if benchmark in after]:
        pair = _Pair(benchmark, before[benchmark], after[benchmark], thresholds)
        figures += len(pair.compared)
        # The field alone says nothing where no figure that it matters to was compared.
        changes.update(pair.environment if policy != "ignore" else ())
        moves += pair.moves(refused=policy == "refuse")
    gone = [benchmark for benchmark in before if benchmark not in after]
    added = [benchmark for benchmark in after if benchmark not in before]
    missing, elsewhere = [], []
    for benchmark in gone:
        twin = next((other for other in added if _differing(benchmark, other) <= set(CONDITIONS)), None)
        if twin is not None and _differing(benchmark, twin) & {"source", "device_semantics"}:
            added.remove(twin)
            elsewhere.append(Missing(benchmark, _instead(benchmark, twin)))
        else:
            missing.append(Missing(benchmark, _instead(benchmark, _nearest(benchmark, added))))
    return Comparison(
        moves=tuple(sorted(moves, key=lambda move: move.severity)),
        missing=tuple(missing),
        elsewhere=tuple(elsewhere),
        added=tuple(added),
        environment=tuple(
            EnvironmentChange(field, old, now, number, everything)
            for (field, old, now, everything), number in changes.items()
        ),
        policy=policy,
        benchmarks=len(before) - len(gone),
        figures=figures,
    )


def identify(record: Record) -> Benchmark:
    """The values of `IDENTITY`: what the record's benchmark is."""
    values = {name: getattr(record, name) for name in IDENTITY}
    # As the command line writes it: a density of 1.0 is not a count of 1.
    values["budget"] = None if record.budget is None else str(record.budget)
    return tuple(values.values())


def name(benchmark: Benchmark, among: Iterable[Benchmark] | None = None) -> str:
    """The benchmark in a line: the method with its budget, the workload, then what is not as `Record` has it unsaid.

    With `among`, what all of those share is left out behind the workload; without, the name is the same in any company.
    """
    method, budget, model, batch, seq, dtype, *_ = benchmark
    label = method if budget is None else f"{method}[{budget}]"
    parts = [f"{label} on {model}", f"{batch} x {seq}", str(dtype)]
    others = None if among is None else list(among)
    for position, field in list(enumerate(IDENTITY))[6:]:
        given = benchmark[position]
        if others is not None:
            said = len({other[position] for other in others}) > 1 and given is not None
        else:
            said = given != Record.__dataclass_fields__[field].default
        if said:
            parts.append(str(given) if field in ("source", "device_semantics") else f"{field} {_plain(given)}")
    return ", ".join(parts)


def _plain(given: object) -> object:
    return {True: "on", False: "off"}.get(given, given) if isinstance(given, bool) else given


class _Pair:
    """The old and the new record of one benchmark."""

    def __init__(self, benchmark: Benchmark, old: Record, new: Record, thresholds: Mapping[str, Threshold]):
        self.benchmark, self.old, self.new, self.thresholds = benchmark, old, new, thresholds

    @property
    def compared(self) -> list[str]:
        """The figures that are tracked and that both records have."""
        if {self.old.status, self.new.status} != {"ok"}:
            return []
        return [field for field, *values in self._tracked() if None not in values]

    @property
    def environment(self) -> set[tuple[str, object, object, bool]]:
        """What differs of what matters to a figure that is compared: field, old, new, whether to every figure."""
        found = self._changed(VERSIONS) if self.compared else set()
        everything = self._on_a_gpu
        if (everything and self.compared) or any(field in OF_THE_MACHINE for field in self.compared):
            found |= self._changed(MACHINE, everything)
        return found

    def moves(self, refused: bool) -> list[Move]:
        """The status, or the figures, that moved; `refused`: where the environment changed they are not judged."""
        if self.old.status != self.new.status:
            verdict = REGRESSION if self.old.status == "ok" else IMPROVEMENT if self.new.status == "ok" else CHANGE
            move = Move(self.benchmark, "status", self.old.status, self.new.status, verdict, self.new.reason or "")
            return [replace(move, environment=self._mattering("status"))]
        if self.old.status != "ok":
            return []
        found = []
        for field, old, new in self._tracked():
            move = self._move(field, old, new)
            if move is not None:
                move = replace(move, environment=self._mattering(field))
                found.append(self._set_aside(move) if refused else move)
        return found

    def _tracked(self) -> list[tuple[str, int | float | None, int | float | None]]:
        fields = [field for field, threshold in self.thresholds.items() if threshold.rule != "ignore"]
        return [(field, getattr(self.old, field), getattr(self.new, field)) for field in fields]

    def _move(self, field: str, old: int | float | None, new: int | float | None) -> Move | None:
        if old == new:
            return None
        if new is None:
            return Move(self.benchmark, field, old, new, REGRESSION, "no longer obtained")
        if old is None:
            return Move(self.benchmark, field, old, new, CHANGE, "not obtained before")
        threshold = self.thresholds[field]
        if threshold.rule == "interval":
            return self._interval_move(field, old, new, threshold)
        if threshold.allows(old, new):
            return None
        return Move(self.benchmark, field, old, new, *self._judged(field, old, new))

    def _judged(self, field: str, old: int | float, new: int | float) -> tuple[str, str]:
        if field in NEVER_BETTER:
            return REGRESSION, ""
        verdict = REGRESSION if (new < old) == (field in WORSE_WHERE_SMALLER) else IMPROVEMENT
        whole = PARTS.get(field)
        if whole is not None:
            before, after = getattr(self.old, whole), getattr(self.new, whole)
            if None not in (before, after) and (after - before) * (new - old) < 0:
                return CHANGE, f"{whole} went the other way"
        return verdict, ""

    def _interval_move(self, field: str, old: float, new: float, threshold: Threshold) -> Move | None:
        before, after = (
            (getattr(record, f"{field}_low"), getattr(record, f"{field}_high")) for record in (self.old, self.new)
        )
        # By the smaller of the two, so that a move and its reverse are told alike.
        if threshold.allows(min(old, new), max(old, new)):
            return None
        if None in (*before, *after):
            return Move(self.benchmark, field, old, new, UNDECIDED, "an interval was not obtained")
        if after[0] <= before[1] and before[0] <= after[1]:
            return None
        verdict = REGRESSION if new > old else IMPROVEMENT
        return Move(self.benchmark, field, old, new, verdict, "", before, after)

    def _set_aside(self, move: Move) -> Move:
        """The move without a judgement where what matters to its figure changed."""
        if not move.environment or None in (move.old, move.new):
            return move
        fields = ", ".join(field for field, *_ in move.environment)
        return replace(move, verdict=INCOMPARABLE, note=f"{fields} changed")

    def _mattering(self, figure: str) -> tuple[tuple[str, object, object], ...]:
        """What changed that matters to the figure, by name of the field; to the status everything does."""
        changed = self._changed(VERSIONS)
        if self._on_a_gpu or figure == "status" or figure in OF_THE_MACHINE:
            changed |= self._changed(MACHINE)
        found = [(field, old, new) for field, old, new, _ in sorted(changed, key=lambda change: change[0])]
        # A run that failed may not say what it ran on, which is no other environment.
        return tuple(each for each in found if figure != "status" or None not in each)

    @property
    def _on_a_gpu(self) -> bool:
        return self.old.source == "measured" and self.old.device_semantics == "cuda"

    def _changed(self, fields: Sequence[str], everything: bool = True) -> set[tuple[str, object, object, bool]]:
        found = set()
        for field in fields:
            old, new = self._version(field, self.old), self._version(field, self.new)
            # A workload without transformers may or may not say its version.
            if old != new and not (field == "transformers_version" and None in (old, new)):
                found.add((field, old, new, everything))
        return found

    def _version(self, field: str, record: Record) -> object:
        given = getattr(record, field)
        if field == "torch_version" and given is not None and not self._on_a_gpu:
            return given.partition("+")[0]
        return given


def by_benchmark(records: Iterable[Record], whose: str) -> dict[Benchmark, Record]:
    """The records by what they are; raises `RecordError` where one is there twice, `whose` records they are named."""
    found: dict[Benchmark, Record] = {}
    for record in records:
        benchmark = identify(record)
        if benchmark in found:
            raise RecordError(f"{whose}: a benchmark is there twice, leave one out: {name(benchmark)}")
        found[benchmark] = record
    return found


def _differing(one: Benchmark, other: Benchmark) -> set[str]:
    return {field for field, a, b in zip(IDENTITY, one, other, strict=True) if a != b}


def _instead(one: Benchmark, other: Benchmark | None) -> tuple[tuple[str, object, object], ...]:
    if other is None:
        return ()
    return tuple((field, a, b) for field, a, b in zip(IDENTITY, one, other, strict=True) if a != b)


def _nearest(benchmark: Benchmark, others: Iterable[Benchmark]) -> Benchmark | None:
    """The benchmark of the same method and model that differs in the fewest fields, two at most."""
    near = [
        other
        for other in others
        if not _differing(benchmark, other) & {"method", "model"} and len(_differing(benchmark, other)) <= 2
    ]
    return min(near, key=lambda other: len(_differing(benchmark, other)), default=None)
