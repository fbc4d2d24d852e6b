"""A training run: the same again to the bit, paired between methods, and blind to the test set until its end."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.harness.errors import InputError
from benchmarks.harness.plan import plan
from benchmarks.harness.protocol import Diverged
from benchmarks.quality import training
from benchmarks.quality.study import ARMS
from benchmarks.quality.training import FINAL, TUNING, Outcome, Trial, run


@pytest.fixture
def trial(model, small):
    """Makes trials on the small tasks; by default two steps of full fine-tuning."""

    def make(**changes):
        common = {
            "purpose": TUNING,
            "task": "trec",
            "train_size": 40,
            "arm": "full",
            "method": "full",
            "budget": None,
            "lr": 1e-3,
            "seed": 0,
            "steps": 2,
            "model": model,
            "batch": 8,
            "longest": 16,
            "train_rest": "none",
            "calibration_steps": 2,
        }
        return Trial(**common | changes)

    return make


def lasting(outcome):
    """An outcome without its times."""
    return replace(outcome, time_s=None, preparation_time_s=None, environment={})


def labels(examples):
    return np.array([example.label for example in examples])


# --- the learning rate


@pytest.mark.parametrize(
    ("steps", "factors"),
    [
        (1, [1.0]),
        (4, [1.0, 1.0, 2 / 3, 1 / 3]),
        # 6 % of 50 steps are 3: up to the whole rate, then down by as much each step, to zero after the last.
        (50, [1 / 3, 2 / 3, 1.0, *np.arange(47, 0, -1) / 47]),
    ],
)
def test_the_learning_rate_rises_then_falls_to_zero(trial, monkeypatch, steps, factors):
    seen, step = [], training.training_step

    def watched(state, *rest):
        seen.append([group["lr"] for optimizer in state.optimizers for group in optimizer.param_groups])
        return step(state, *rest)

    monkeypatch.setattr(training, "training_step", watched)
    run(trial(method="sparsegrad", budget=20, lr=0.002, steps=steps))
    assert len(seen[0]) >= 2  # SparseAdam's and AdamW's
    np.testing.assert_allclose(seen, 0.002 * np.array(factors)[:, None] * np.ones(len(seen[0])), rtol=1e-12)


# --- the same again


@pytest.mark.parametrize(("method", "budget"), [("lora", 3), ("sparsegrad-core", 40), ("sparsegrad", 20)])
def test_the_same_trial_gives_the_same_outcome(trial, method, budget):
    asked = trial(purpose=FINAL, task="amazon", method=method, budget=budget, steps=6, lr=0.01)
    random.seed(1)
    torch.manual_seed(1)
    first = lasting(run(asked))
    random.seed(2)
    torch.manual_seed(2)
    assert lasting(run(asked)) == first
    assert run(replace(asked, seed=1, steps=1)).losses[0] != first.losses[0]


def test_methods_have_the_same_loss_before_the_first_update(trial):
    budgets = {"full": None, "head": None, "lora": 3, "sparsegrad-core": 40, "random-mask": 40, "sparsegrad": 20}
    # The first loss, dropout included: adapters begin as the identity, and a new basis changes nothing but rounding.
    first = {method: run(trial(method=method, budget=b, steps=1)).losses[0] for method, b in budgets.items()}
    assert first == pytest.approx(dict.fromkeys(budgets, first["full"]), rel=1e-5)


@pytest.mark.parametrize("method", sorted({arm.method for arm in ARMS.values()} - {"head"}))
def test_every_arm_trains_more_than_the_head(trial, model, method):
    (spec,) = plan(method, "lora[3]", model=model, seq=16)
    asked = trial(purpose=FINAL, method=method, budget=spec.budget, steps=12, lr=0.01)
    outcome, head = run(asked), run(replace(asked, method="head", budget=None))
    assert len(outcome.predictions) == len(head.predictions) == 40
    assert all(math.isfinite(loss) for loss in outcome.losses)
    assert outcome.losses[0] == pytest.approx(head.losses[0], rel=0.05 if method == "qlora" else 1e-5)
    # By ten times what rounding makes of the first loss.
    assert abs(outcome.losses[-1] / head.losses[-1] - 1) > 1e-4
    assert outcome.trainable_params > head.trainable_params


def test_the_two_labellings_of_a_text_have_the_same_batches(trial, small, monkeypatch):
    small["trec-fine"] = replace(small["trec"], data=replace(small["trec"].data, name="trec-fine"))
    seen, step = [], training.training_step
    monkeypatch.setattr(
        training, "training_step", lambda state, batch, *rest: seen.append(batch) or step(state, batch, *rest)
    )
    for task in ("trec", "trec-fine"):
        run(trial(task=task, method="head"))
    assert [batch["input_ids"].tolist() for batch in seen[:2]] == [batch["input_ids"].tolist() for batch in seen[2:]]


# --- what is trained and kept


def test_the_loss_falls(trial):
    outcome = run(trial(lr=0.01, steps=60, train_size=24))
    assert len(outcome.losses) == 10
    assert outcome.losses[-1] < 0.7 * outcome.losses[0]


@pytest.mark.parametrize(
    ("steps", "points", "sizes"),
    [(20, [4, 8, 12, 16, 20], [2] * 10), (7, [1, 3, 4, 6, 7], [1] * 7), (2, [1, 2], [1, 1])],
)
def test_steps_losses_and_curve(trial, monkeypatch, steps, points, sizes):
    losses, step = [], training.training_step

    def watched(*arguments):
        losses.append(step(*arguments))
        return losses[-1]

    monkeypatch.setattr(training, "training_step", watched)
    outcome = run(trial(purpose=FINAL, method="head", steps=steps))
    assert len(losses) == steps
    assert [at for at, _ in outcome.curve] == points
    parts = np.split(np.array(losses), np.cumsum(sizes)[:-1])
    assert outcome.losses == pytest.approx([part.mean() for part in parts])


def test_the_whole_pool_and_what_trains(trial, small):
    data = small["trec"].data
    small["trec"] = replace(small["trec"], data=replace(data, train=data.train[:20]))
    outcome = run(trial(train_size=None, method="lora", budget=3))
    # Rank 3 on two layers of each kind, 16 and 32 wide, and the head's 6 x 16 weights and 6 biases.
    assert outcome.trainable_params == 4 * 3 * (16 + 32) + 6 * 17
    with pytest.raises(InputError, match="a pool of 20 examples"):
        run(trial(train_size=21))


@pytest.mark.parametrize("task", ["trec", "amazon"])
def test_a_final_run_is_scored_on_test(trial, small, task):
    outcome = run(trial(purpose=FINAL, task=task, lr=0.01, steps=20))
    truth, found = labels(small[task].data.test), np.array(outcome.predictions)
    if task == "trec":
        assert outcome.score == pytest.approx(100 * (found == truth).mean())
    else:
        assert outcome.score == pytest.approx(100 * np.corrcoef(found, truth)[0, 1])
        assert (found == found.round(3)).all()
    assert outcome.score != 0


def test_a_tuning_run_is_scored_on_validation(trial, small):
    # With validation and test in each other's place, and as many steps, a final run sees what a tuning run saw.
    data = small["trec"].data
    tuning = run(trial(lr=0.01, steps=20))
    small["trec"] = replace(small["trec"], data=replace(data, validation=data.test, test=data.validation))
    swapped = run(trial(purpose=FINAL, lr=0.01, steps=20))
    assert tuning.score == swapped.score
    assert swapped.score != swapped.curve[-1][1]
    assert (tuning.predictions, tuning.curve) == (None, ())


class Untouchable(tuple):
    """Examples that nobody may look at."""

    def _refuse(self, *_):
        raise AssertionError("the test set was read")

    __iter__ = __len__ = __getitem__ = __bool__ = _refuse


def test_a_tuning_run_does_not_read_the_test_set(trial, small):
    small["trec"] = replace(small["trec"], data=replace(small["trec"].data, test=Untouchable()))
    assert run(trial(method="lora", budget=3)).status == "ok"
    with pytest.raises(AssertionError, match="the test set was read"):
        run(trial(purpose=FINAL))


def test_a_loss_that_is_not_finite(trial):
    with pytest.raises(Diverged):
        run(trial(task="amazon", lr=1e30, steps=5))


# --- JSON


def test_an_outcome_survives_json(trial):
    outcomes = [
        run(trial(purpose=FINAL, task="amazon", steps=5)),
        run(trial(train_size=None, method="head", steps=1)),
        Outcome(trial(method="random-mask", budget=0.01), "killed", "out of memory"),
    ]
    for outcome in outcomes:
        assert Outcome.from_dict(json.loads(json.dumps(outcome.to_dict(), allow_nan=False))) == outcome
        assert outcome.trial in {Outcome.from_dict(outcome.to_dict()).trial}


@pytest.mark.parametrize(
    "wrong",
    [
        {"status": "fine"},
        {"score": None},
        {"score": "high"},
        {"score": float("nan")},
        {"predictions": None},
        {"predictions": 3},
        {"curve": [1]},
        {"trial": {}},
        {"more": 1},
    ],
)
def test_what_is_no_outcome(trial, wrong):
    right = Outcome(trial(purpose=FINAL), "ok", score=1.0, predictions=(1.0,)).to_dict()
    assert Outcome.from_dict(right).score == 1.0
    with pytest.raises((TypeError, KeyError, ValueError)):
        Outcome.from_dict(right | wrong)


@pytest.mark.parametrize("raw", [[], 3, None, "ok", {}])
def test_what_is_no_object(raw):
    with pytest.raises((TypeError, KeyError)):
        Outcome.from_dict(raw)
