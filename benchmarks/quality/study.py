"""The quality study: which arms on which tasks, in which order; docs/quality-protocol.md says why.

A study is a list of training runs that follows from its settings and from what is done already: the learning rate of an
arm on a task is tuned first, and the final runs take the best. So it can be cut off anywhere and go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from baselines.method import Budget
from benchmarks.harness.budget import equal_memory
from benchmarks.harness.errors import InputError
from benchmarks.harness.plan import plan, plan_equal_memory
from benchmarks.harness.predict import predict
from benchmarks.quality.training import FINAL, TUNING, Outcome, Trial
from reports.record import Record

PROTOCOL = 1  # raised when docs/quality-protocol.md changes what a result means

REFERENCE = "lora[7]"
METRIC = "peak_step_bytes"
# The case whose memory is matched: what a user of 16 texts of up to 64 tokens would see.
MEMORY_BATCH, MEMORY_SEQ = 16, 64

# Learning rates that are tried, half a decade apart: as many for every arm, one step lower for the arm whose every
# parameter trains and one higher for the one whose pretrained parameters do not.
LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
LOWER_LRS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
HIGHER_LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)

PARAMETERS, PEAK, NONE = "parameters", "peak", "none"


@dataclass(frozen=True)
class Arm:
    """A method as it enters the study: `matched` says in what its budget equals LoRA's, `lrs` what is tried."""

    name: str
    method: str
    matched: str
    lrs: tuple[float, ...] = LRS


# The primary endpoint compares the first two.
PRIMARY = (
    Arm("lora", "lora", PARAMETERS),
    Arm("sparsegrad-core@peak", "sparsegrad-core", PEAK),
)
CORE = (
    *PRIMARY,
    Arm("sparsegrad-directions@peak", "sparsegrad-directions", PEAK),
    Arm("sparsegrad-core", "sparsegrad-core", PARAMETERS),
    Arm("sparsegrad-directions", "sparsegrad-directions", PARAMETERS),
    Arm("random-mask", "random-mask", PARAMETERS),
    Arm("full", "full", NONE, LOWER_LRS),
    Arm("sparsegrad", "sparsegrad", PARAMETERS),
    Arm("meprop-weight", "meprop-weight", PARAMETERS),
    Arm("head", "head", NONE, HIGHER_LRS),
)
EXTENDED = (
    Arm("sparsegrad-fixed@peak", "sparsegrad-fixed", PEAK),
    Arm("sparsegrad-fixed", "sparsegrad-fixed", PARAMETERS),
    Arm("sparsegrad-compact", "sparsegrad-compact", PARAMETERS),
    Arm("meprop-example", "meprop-example", PARAMETERS),
    Arm("meprop-unified", "meprop-unified", PARAMETERS),
)
ARMS = {arm.name: arm for arm in (*CORE, *EXTENDED)}
CORE_TASKS = ("trec", "trec-fine", "movie-sentiment", "amazon", "nyt", "tweets")


@dataclass(frozen=True)
class Study:
    """The settings of a study; what is not given is the core study's.

    `train_size` None is the whole pool. Final runs have seeds 0 to `seeds` - 1, tuning runs `tuning_seed`. `lrs` None
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
    tuning_seed: int = 1000
    hub: bool = False

    def __post_init__(self):
        if strange := [name for name in self.arms if name not in ARMS]:
            raise InputError(f"unknown arm {strange[0]!r}: choose of {', '.join(ARMS)}")
        for what, values in (("tasks", self.tasks), ("arms", self.arms), ("lrs", self.lrs)):
            if values is None:
                continue
            if not values or len(set(values)) < len(values):
                raise InputError(f"{what} must be one or more, each once, got {', '.join(map(str, values)) or 'none'}")
        for what in ("epochs", "batch", "longest", "seeds"):
            if getattr(self, what) < 1:
                raise InputError(f"{what} must be at least 1, got {getattr(self, what)}")

    def lrs_of(self, arm: str) -> tuple[float, ...]:
        """The learning rates that are tried for an arm."""
        return ARMS[arm].lrs if self.lrs is None else self.lrs

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, object]) -> Study:
        """From JSON."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()})

    def steps(self, pool: int) -> int:
        """Steps of a final run whose task has a pool of so many examples; a tuning run has a third."""
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
        arm = ARMS[name]
        if arm.matched == PEAK:
            found[name] = _at_equal_peak(arm, common)
        else:
            found[name] = predict(plan(arm.method, REFERENCE, **common)[0])
        record = found[name]
        if record.status != "ok" or (arm.matched == PEAK and not record.matched):
            raise InputError(f"the arm {name} has no budget: {record.status}, {record.reason}")
        say(f"arm {name}: {record.label}, peak {record.peak_step_bytes / 2**20:.1f} MiB")
    return found


def _at_equal_peak(arm: Arm, common: Mapping[str, object]) -> Record:
    reference, (spec,), largest = plan_equal_memory(arm.method, REFERENCE, METRIC, **common)
    limit = predict(reference)
    if limit.status != "ok":
        raise InputError(f"nothing can be matched to {limit.label}: {limit.status}, {limit.reason}")
    return equal_memory(
        lambda budget: predict(replace(spec, budget=budget)), METRIC, getattr(limit, METRIC), largest[arm.method]
    )


def stages(study: Study) -> Iterator[tuple[str, ...]]:
    """The arms in the order in which they are done: those of the primary endpoint, then all others."""
    primary = tuple(arm.name for arm in PRIMARY if arm.name in study.arms)
    others = tuple(name for name in study.arms if name not in primary)
    yield from (stage for stage in (primary, others) if stage)


def trials(study: Study, budgets: Mapping[str, Budget], pools: Mapping[str, int], done: Iterable[Outcome]):
    """Every trial of the study in order; None in the place of one whose learning rate is not known yet.

    Args:
        study: the settings.
        budgets: of each arm.
        pools: the examples in each task's pool.
        done: outcomes so far.
    """
    tuned = {(o.trial.arm, o.trial.task, o.trial.lr): o for o in done if o.trial.purpose == TUNING}
    for arms in stages(study):
        for task in study.tasks:
            for arm in arms:
                for lr in study.lrs_of(arm):
                    steps = max(1, study.steps(pools[task]) // 3)
                    yield _trial(study, TUNING, task, arm, budgets[arm], lr, study.tuning_seed, steps)
        for seed in range(study.seeds):
            for task in study.tasks:
                for arm in arms:
                    outcomes = [tuned.get((arm, task, lr)) for lr in study.lrs_of(arm)]
                    if any(outcome is None for outcome in outcomes):
                        yield None
                        continue
                    yield _trial(
                        study, FINAL, task, arm, budgets[arm], best_lr(outcomes), seed, study.steps(pools[task])
                    )


def best_lr(outcomes: Iterable[Outcome]) -> float:
    """The learning rate with the best score on validation; of equal ones, and where all failed, the smallest."""
    outcomes = list(outcomes)
    scores = [-math.inf if o.status != "ok" else o.score for o in outcomes]
    return min(o.trial.lr for o, value in zip(outcomes, scores, strict=True) if value == max(scores))


def _trial(study: Study, purpose: str, task: str, arm: str, budget: Budget, lr: float, seed: int, steps: int) -> Trial:
    return Trial(
        purpose=purpose,
        task=task,
        train_size=study.train_size,
        arm=arm,
        method=ARMS[arm].method,
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
