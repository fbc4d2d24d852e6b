"""One training run of the quality study: a method on a task, from the pretrained model to its predictions."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import torch
from torch.optim.lr_scheduler import LambdaLR

from baselines.method import Budget
from benchmarks.harness import models
from benchmarks.harness.environment import environment
from benchmarks.harness.protocol import build, ready, training_step, untracked
from benchmarks.harness.spec import RunSpec
from benchmarks.quality.statistics import score
from benchmarks.quality.tasks import TaskWorkload, load_task
from reports.reading import misfit, shown
from reports.record import STATUSES

# The learning rate rises over this share of the steps, then falls to zero, both linearly.
WARM_UP_SHARE = 0.06
# A final run is scored on validation at the end of each of so many equal parts of its steps, on so many examples.
CURVE_POINTS = 5
CURVE_EXAMPLES = 200
# The mean training loss is kept for each of so many equal parts.
LOSS_POINTS = 10

TUNING, FINAL = "tuning", "final"


@dataclass(frozen=True)
class Trial:
    """What one training run is asked to do.

    `arm` is the name under which a method with a budget enters the study. A `tuning` run is scored on validation, a
    `final` one on test. `train_size` None means the whole pool; `longest` is the number of tokens after which a text is
    cut off.
    """

    purpose: str
    task: str
    train_size: int | None
    arm: str
    method: str
    budget: Budget
    lr: float
    seed: int
    steps: int
    model: str
    batch: int
    longest: int
    train_rest: str
    calibration_steps: int = 30
    optimizer_impl: str = "fused"
    hub: bool = False
    threads: int = 1

    @property
    def label(self) -> str:
        """For people."""
        size = "all" if self.train_size is None else self.train_size
        return f"{self.purpose} {self.arm} on {self.task} ({size}), lr {self.lr:g}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What became of a trial; `status` and `reason` as in a record.

    `score` in points, on validation for a tuning run, on test for a final one, whose test `predictions` are kept.
    `losses` are means over equal parts of the training, `curve` holds (step, score on validation).
    """

    trial: Trial
    status: str
    reason: str | None = None
    score: float | None = None
    predictions: tuple[float, ...] | None = None
    losses: tuple[float, ...] = ()
    curve: tuple[tuple[int, float], ...] = ()
    trainable_params: int | None = None
    preparation_time_s: float | None = None
    time_s: float | None = None
    environment: dict[str, int | float | str | bool | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, object]) -> Outcome:
        """From JSON. Raises `TypeError`, `KeyError` or `ValueError` for what is no outcome."""
        if not isinstance(raw, dict):
            raise TypeError(f"an outcome must be a JSON object, got {type(raw).__name__}")
        tuples = {name: tuple(raw[name]) for name in ("predictions", "losses") if raw.get(name) is not None}
        curve = tuple(tuple(point) for point in raw.get("curve", ()))
        outcome = cls(**{**raw, **tuples, "curve": curve, "trial": Trial(**raw["trial"])})
        if fault := misfit(outcome.trial) or misfit(outcome):
            raise ValueError(fault)
        if outcome.status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {shown(outcome.status)}")
        if outcome.status == "ok":
            if outcome.score is None:
                raise ValueError("a run that ended ok has a score")
            if outcome.trial.purpose == FINAL and outcome.predictions is None:
                raise ValueError("a final run that ended ok has predictions")
        return outcome


def run(trial: Trial) -> Outcome:
    """Train and score. Raises what a run of the harness raises: `InputError`, `Diverged`, out of memory, ..."""
    started = time.perf_counter()
    torch.set_num_threads(trial.threads)
    task = load_task(trial.task, trial.hub)
    seed = task.seed(trial.seed)
    spec = RunSpec(
        method=trial.method,
        budget=trial.budget,
        model=trial.model,
        batch=trial.batch,
        seq=trial.longest,
        train_rest=trial.train_rest,
        optimizer_impl=trial.optimizer_impl,
        calibration_steps=trial.calibration_steps,
        lr=trial.lr,
        seed=seed,
        hub=trial.hub,
        threads=trial.threads,
    )
    workload = TaskWorkload(
        task,
        task.training_set(trial.train_size, seed),
        models.resolve(trial.model, hub=trial.hub),
        batch=trial.batch,
        seq=trial.longest,
        dtype=spec.dtype,
        device="cpu",
        seed=seed,
        targets=spec.targets,
    )
    method, model, shapes = build(spec, workload)
    before = time.perf_counter()
    method.prepare(model, workload.batches())
    preparation_time_s = time.perf_counter() - before
    trainable_params = method.counts(model, shapes).trainable_params
    state = ready(spec, workload, method, model)
    schedules = [LambdaLR(optimizer, rate_factor(trial.steps)) for optimizer in state.optimizers]

    batches, losses, curve = workload.batches(), [], []
    marks = {round(trial.steps * (i + 1) / CURVE_POINTS) for i in range(CURVE_POINTS)}
    seen = task.data.validation[:CURVE_EXAMPLES]
    for step in range(1, trial.steps + 1):
        losses.append(training_step(state, next(batches), untracked))
        for schedule in schedules:
            schedule.step()
        if trial.purpose == FINAL and step in marks:
            curve.append((step, _score(task, workload.predictions(model, seen), seen)))

    examples = task.data.test if trial.purpose == FINAL else task.data.validation
    predictions = workload.predictions(model, examples)
    decimals = 0 if task.data.label_names else 3  # ratings have one decimal
    predictions = predictions.round(decimals)
    return Outcome(
        trial,
        "ok",
        score=_score(task, predictions, examples),
        predictions=tuple(predictions.tolist()) if trial.purpose == FINAL else None,
        losses=_means(losses),
        curve=tuple(curve),
        trainable_params=trainable_params,
        preparation_time_s=preparation_time_s,
        time_s=time.perf_counter() - started,
        environment=environment("cpu"),
    )


def _score(task, predictions, examples) -> float:
    return float(score(task.metric, predictions, [example.label for example in examples]))


def _means(losses: list[float]) -> tuple[float, ...]:
    """The mean of each of `LOSS_POINTS` equal parts; of every step where there are fewer."""
    parts = min(LOSS_POINTS, len(losses))
    edges = [round(len(losses) * i / parts) for i in range(parts + 1)]
    return tuple(sum(losses[a:b]) / (b - a) for a, b in pairwise(edges))


def rate_factor(steps: int) -> Callable[[int], float]:
    """Step from 0 -> share of the learning rate: up over the first `WARM_UP_SHARE`, then down to zero."""
    warm_up = max(1, round(WARM_UP_SHARE * steps))
    return lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up), 1.0)
