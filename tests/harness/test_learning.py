"""Every method learns by itself: with the head frozen, its own parameters lower the loss on real text."""

import itertools
from functools import cache

import pytest
import torch

from baselines.method import TASK_HEAD
from baselines.registry import get, methods
from benchmarks.harness.protocol import build, ready
from benchmarks.harness.spec import RunSpec

BATCHES, WARM_UP_STEPS, STEPS = 3, 12, 9
# What methods that step whole weights, entries of them in their own or another basis, or small factors can take.
LRS = {"full": 2e-4, "gmt": 2e-4, "galore": 1e-3, "apollo": 1e-3, "meprop-example": 5e-4, "meprop-unified": 2e-3}
# What methods can take that train a few entries between matrices that stay.
LRS |= {"lora-xs": 2e-2, "vera": 5e-2}
LR = 5e-3
# The share of its loss that a method must have learnt; without its own parameters the loss does not move at all.
LEAST = 0.05
METHODS = [name for name in methods() if name != "head"]


def made(method, lr):
    budget = None if get(method).knob is None else get(method).knob.default
    spec = RunSpec(method, budget, model="minilm-l6", batch=8, seq=24, train_rest="none", calibration_steps=3, lr=lr)
    return spec, spec.workload()


@cache
def head():
    """The head after a short training of it alone."""
    spec, workload = made("head", 1e-2)
    method, model, _ = build(spec, workload)
    method.prepare(model, workload.batches())
    state = ready(spec, workload, method, model)
    model.eval()
    for batch in itertools.islice(itertools.cycle(seen(workload)), WARM_UP_STEPS):
        step(state, batch)
    return {name: p.detach().clone() for name, p in model.named_parameters() if TASK_HEAD.search(name)}


def seen(workload):
    return list(itertools.islice(workload.batches(), BATCHES))


def step(state, batch):
    state.model.zero_grad(set_to_none=True)
    state.workload.backward(state.workload.forward(state.model, batch))
    state.method.after_backward(state.model)
    for optimizer in state.optimizers:
        optimizer.step()
    state.method.after_step(state.model)


@torch.no_grad()
def loss(state):
    return sum(float(state.model(**batch).loss) for batch in seen(state.workload)) / BATCHES


def trained(name, own):
    """A method's state after training, and the loss before and after; `own`: whether its own parameters train."""
    spec, workload = made(name, LRS.get(name, LR))
    method, model, _ = build(spec, workload)
    model.load_state_dict(head(), strict=False)
    method.prepare(model, workload.batches())
    for parameter_name, parameter in model.named_parameters():
        if TASK_HEAD.search(parameter_name) or not own:
            parameter.requires_grad_(False)
    state = ready(spec, workload, method, model)
    # Without dropout, so that two losses of one model are the same.
    model.eval()
    before = loss(state)
    for batch in itertools.islice(itertools.cycle(seen(workload)), STEPS):
        step(state, batch)
    return state, before, loss(state)


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_falls_by_what_the_method_trains(name):
    state, before, after = trained(name, own=True)
    assert after < (1 - LEAST) * before
    # What it became is a plain model that says the same.
    batch = seen(state.workload)[0]
    with torch.no_grad():
        said = state.model(**batch).logits
        plain = state.method.export(state.model)
        torch.testing.assert_close(plain(**batch).logits, said, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["lora", "sparsegrad-core"])
def test_without_its_own_parameters_it_does_not(name):
    _, before, after = trained(name, own=False)
    assert after == before
