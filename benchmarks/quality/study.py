"""The quality study: which arms on which tasks, in which order; docs/quality-protocol.md says why.

A study is a list of training runs that follows from its settings and from what is done already: the learning rate of an
arm on a task is tuned first, and the final runs take the best. So it can be cut off anywhere and go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean

from baselines.method import Budget
from baselines.registry import may_be
from benchmarks.harness.budget import equal_memory
from benchmarks.harness.errors import InputError
from benchmarks.harness.plan import plan, plan_equal_memory
from benchmarks.harness.predict import predict
from benchmarks.harness.text import SENTIMENT
from benchmarks.quality.training import FINAL, TUNING, Outcome, Trial
from reports.reading import shown
from reports.record import Record

REFERENCE = "lora[7]"
METRIC = "peak_step_bytes"
# The case whose memory is matched: what a user of 16 texts of up to 64 tokens would see.
MEMORY_BATCH, MEMORY_SEQ = 16, 64

# The learning rates that can be tried. Each arm has four neighbours of them, around those that were best for it in
# protocol 1, where five from 1e-4 to 1e-2 were tried (`full` 3e-5 to 3e-3, `head` 3e-4 to 3e-2); those from `pissa` on
# were not in it, and docs/quality-protocol.md says what theirs come from.
SERIES = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
TRIED = 4
TUNING_SEEDS = (1000, 1001)

PARAMETERS, PEAK, NONE = "parameters", "peak", "none"
AT_PEAK = f"@{PEAK}"


@dataclass(frozen=True)
class Arm:
    """A method as it enters the study: `matched` says in what its budget equals LoRA's, `lowest` the first rate."""

    name: str
    method: str
    matched: str
    lowest: float = 5e-4

    @property
    def lrs(self) -> tuple[float, ...]:
        """The learning rates that are tried: (`TRIED`,), ascending."""
        first = SERIES.index(self.lowest)
        return SERIES[first : first + TRIED]


# The primary endpoint compares the first two.
PRIMARY = (
    Arm("lora", "lora", PARAMETERS),
    Arm("sparsegrad-core@peak", "sparsegrad-core", PEAK, 2e-4),
)
CORE = (
    *PRIMARY,
    Arm("full", "full", NONE, 5e-5),
    Arm("random-mask", "random-mask", PARAMETERS, 2e-3),
    Arm("sparsegrad-core", "sparsegrad-core", PARAMETERS, 1e-3),
    Arm("sparsegrad-directions@peak", "sparsegrad-directions", PEAK, 2e-4),
    Arm("sparsegrad", "sparsegrad", PARAMETERS),
    Arm("meprop-weight", "meprop-weight", PARAMETERS),
    Arm("head", "head", NONE, 5e-3),
)
EXTENDED = (
    Arm("sparsegrad-directions", "sparsegrad-directions", PARAMETERS),
    Arm("sparsegrad-fixed@peak", "sparsegrad-fixed", PEAK, 2e-4),
    Arm("sparsegrad-fixed", "sparsegrad-fixed", PARAMETERS, 2e-3),
    Arm("sparsegrad-compact", "sparsegrad-compact", PARAMETERS),
    Arm("meprop-example", "meprop-example", PARAMETERS),
    Arm("meprop-unified", "meprop-unified", PARAMETERS),
    Arm("pissa", "pissa", PARAMETERS, 2e-4),
    Arm("qlora", "qlora", PARAMETERS),
    Arm("dora", "dora", PARAMETERS),
    Arm("lora-fa", "lora-fa", PARAMETERS, 1e-3),
    Arm("lora-fa@peak", "lora-fa", PEAK, 1e-3),
    Arm("lora-xs", "lora-xs", PARAMETERS, 1e-3),
    # With as many parameters as LoRA it would have 12,480 directions in each random matrix.
    Arm("vera@peak", "vera", PEAK, 5e-3),
    Arm("bitfit", "bitfit", NONE, 5e-3),
    Arm("gmt", "gmt", PARAMETERS, 2e-4),
    Arm("sift", "sift", PARAMETERS, 1e-3),
    Arm("smt", "smt", PARAMETERS, 2e-3),
    Arm("smt@peak", "smt", PEAK),
    Arm("galore", "galore", PARAMETERS, 2e-3),
    Arm("apollo", "apollo", PARAMETERS, 1e-3),
)
ARMS = {arm.name: arm for arm in (*CORE, *EXTENDED)}
CORE_TASKS = ("trec", "trec-fine", "movie-sentiment", "amazon", "nyt", "tweets")


def arm_of(name: str) -> Arm:
    """The arm of a name: one that is listed here, or `METHOD` and `METHOD@peak` with any other method and LoRA's rates.

    No file is run for `FILE.py:CLASS`, and peft is not asked: whether that method exists is seen when it is predicted.
    Raises `InputError`.
    """
    if name in ARMS:
        return ARMS[name]
    method = name.removesuffix(AT_PEAK)
    if not may_be(method):
        raise InputError(
            f"unknown arm {shown(name)}: choose of {', '.join(ARMS)}, or name any method, which gets LoRA's number of "
            f"parameters, or with {AT_PEAK} behind it LoRA's peak"
        )
    return Arm(name, method, PEAK if name.endswith(AT_PEAK) else PARAMETERS)


@dataclass(frozen=True)
class Study:
    """The settings of a study; what is not given is the core study's.

    `train_size` None is the whole pool. Final runs have seeds 0 to `seeds` - 1, tuning runs `TUNING_SEEDS`. `lrs` None
    is each arm's own.
    """

    model: str = "minilm-l6"
    tasks: tuple[str, ...] = CORE_TASKS
    arms: tuple[str, ...] = tuple(arm.name for arm in CORE)
    train_size: int | None = 300
    epochs: int = 8
    batch: int = 16
    longest: int = 64
    train_rest: str = "none"
    lrs: tuple[float, ...] | None = None
    seeds: int = 8
    hub: bool = False

    def __post_init__(self):
        for name in self.arms:
            arm_of(name)
        for what, values in (("tasks", self.tasks), ("arms", self.arms), ("lrs", self.lrs)):
            if values is None:
                continue
            if not values or len(set(values)) < len(values):
                raise InputError(f"{what} must be one or more, each once, got {', '.join(map(str, values)) or 'none'}")
        if wrong := [lr for lr in self.lrs or () if not 0 < lr < math.inf]:
            raise InputError(f"learning rates must be positive and finite, got {wrong[0]:g}")
        # Their errors depend on each other, and the statistics would take them for independent.
        if twins := [name for name in self.tasks if f"{name}{SENTIMENT}" in self.tasks]:
            raise InputError(f"{twins[0]} and {twins[0]}{SENTIMENT} have the same texts: choose one of them")
        for what in ("epochs", "batch", "longest", "seeds"):
            if getattr(self, what) < 1:
                raise InputError(f"{what} must be at least 1, got {getattr(self, what)}")
        if self.seeds > min(TUNING_SEEDS):
            raise InputError(f"seeds must be at most {min(TUNING_SEEDS)}, where tuning's begin, got {self.seeds}")

    def lrs_of(self, arm: str) -> tuple[float, ...]:
        """The learning rates that are tried for an arm."""
        return arm_of(arm).lrs if self.lrs is None else self.lrs

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, object]) -> Study:
        """From JSON."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()})

    def steps(self, pool: int) -> int:
        """Steps of a run, tuning or final, whose task has a pool of so many examples."""
        return self.epochs * math.ceil((self.train_size or pool) / self.batch)


def records(study: Study, say: Callable[[str], None] = lambda _: None) -> dict[str, Record]:
    """Each arm's prediction of memory and counts with the budget it gets, in the study's case on the CPU.

    Raises:
        InputError: if an arm cannot be matched: no budget of its method is within the reference's peak.
    """
    common = {
        "model": study.model,
        "batch": MEMORY_BATCH,
        "seq": MEMORY_SEQ,
        "train_rest": study.train_rest,
        "optimizer_impl": "fused",
        "device": "cpu",
        "rounds": 0,
        "hub": study.hub,
    }
    found = {}
    for name in study.arms:
        arm = arm_of(name)
        if arm.matched == PEAK:
            found[name] = _at_equal_peak(arm, common)
        else:
            found[name] = predict(plan(arm.method, REFERENCE, **common)[0])
        record = found[name]
        if record.status != "ok" or (arm.matched == PEAK and not record.matched):
            raise InputError(f"the arm {name} has no budget ({record.status}): {record.reason}")
        say(f"arm {name}: {record.label}, peak {record.peak_step_bytes / 2**20:.1f} MiB")
    return found


def _at_equal_peak(arm: Arm, common: Mapping[str, object]) -> Record:
    reference, (spec,), largest = plan_equal_memory(arm.method, REFERENCE, METRIC, **common)
    if arm.method not in largest:
        raise InputError(f"the arm {arm.name} has no budget to match: name it {arm.method}")
    limit = predict(reference)
    if limit.status != "ok":
        raise InputError(f"nothing can be matched to {limit.label}: {limit.status}, {limit.reason}")
    return equal_memory(
        lambda budget: predict(replace(spec, budget=budget)), METRIC, getattr(limit, METRIC), largest[arm.method]
    )


def stages(study: Study) -> Iterator[tuple[str, ...]]:
    """The arms in the order in which they are done: those of the primary endpoint together, then one at a time."""
    primary = tuple(arm.name for arm in PRIMARY if arm.name in study.arms)
    if primary:
        yield primary
    yield from ((name,) for name in study.arms if name not in primary)


def trials(study: Study, budgets: Mapping[str, Budget], pools: Mapping[str, int], done: Iterable[Outcome]):
    """Every trial of the study in order; None in the place of one whose learning rate is not known yet.

    Args:
        study: the settings.
        budgets: of each arm.
        pools: the examples in each task's pool.
        done: outcomes so far.
    """
    outcomes = {outcome.trial: outcome for outcome in done}
    for arms in stages(study):
        tuning = {}
        for task in study.tasks:
            for arm in arms:
                tuning[arm, task] = [
                    _trial(study, TUNING, task, arm, budgets[arm], lr, seed, study.steps(pools[task]))
                    for lr in study.lrs_of(arm)
                    for seed in TUNING_SEEDS
                ]
                yield from tuning[arm, task]
        for seed in range(study.seeds):
            for task in study.tasks:
                for arm in arms:
                    tuned = [outcomes.get(trial) for trial in tuning[arm, task]]
                    if any(outcome is None for outcome in tuned):
                        yield None
                        continue
                    yield _trial(study, FINAL, task, arm, budgets[arm], best_lr(tuned), seed, study.steps(pools[task]))


def best_lr(tuned: Sequence[Outcome]) -> float:
    """The learning rate with the best mean score on validation.

    Of equal ones the one whose training loss ends lowest: a model that answers every text alike has a score that rates
    share by chance. A rate at which a run failed is not taken, and where all have one, the smallest is.
    """
    scores = mean_scores(tuned)
    whole = {lr: score for lr, score in scores.items() if score is not None}
    if not whole:
        return min(scores)
    best = max(whole.values())
    ends = {lr: fmean(o.losses[-1] for o in tuned if o.trial.lr == lr) for lr in whole if whole[lr] == best}
    return min(ends, key=lambda lr: (ends[lr], lr))


def mean_scores(tuned: Iterable[Outcome]) -> dict[float, float | None]:
    """The mean score of the tuning runs at each learning rate, ascending; None where one of them failed."""
    scores: dict[float, list[float | None]] = {}
    for outcome in sorted(tuned, key=lambda o: (o.trial.lr, o.trial.seed)):
        scores.setdefault(outcome.trial.lr, []).append(outcome.score if outcome.status == "ok" else None)
    return {lr: None if None in of else fmean(of) for lr, of in scores.items()}


def _trial(study: Study, purpose: str, task: str, arm: str, budget: Budget, lr: float, seed: int, steps: int) -> Trial:
    return Trial(
        purpose=purpose,
        task=task,
        train_size=study.train_size,
        arm=arm,
        method=arm_of(arm).method,
        budget=budget,
        lr=lr,
        seed=seed,
        steps=steps,
        model=study.model,
        batch=study.batch,
        longest=study.longest,
        train_rest=study.train_rest,
        hub=study.hub,
    )
