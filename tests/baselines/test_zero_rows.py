"""Tokens that do not reach the loss: their rows of dL/dY are zero, and no method's backward pays for them."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from baselines.method import Setting
from baselines.registry import get, methods

D_IN, D_OUT, TOKENS = 15, 20, 32
LIVE = [0, 3, 4, 17, 30]
TARGETED = [name for name in methods() if name != "head"]


def backward(model, batch):
    x, dy = batch
    model(x).backward(dy)


def batches():
    generator = torch.Generator().manual_seed(1)
    while True:
        x = torch.randn(TOKENS, D_IN, generator=generator, dtype=torch.float64)
        yield x, torch.randn(TOKENS, D_OUT, generator=generator, dtype=torch.float64)


def prepared(name):
    """A model of one layer under the method, everything of whose own has moved from where it began."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT, dtype=torch.float64))
    method = get(name)(None, Setting({"linear": ["0"]}, calibration_steps=3, backward=backward))
    method.prepare(model, batches())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def gradients(model, x, dy):
    """dL/dX and the gradients by parameter, dense; and the products' flops in backward."""
    x = x.clone().requires_grad_()
    y = model(x)
    model.zero_grad(set_to_none=True)
    with FlopCounterMode(display=False) as counter:
        y.backward(dy)
    own = {
        n: p.grad.to_dense() if p.grad.layout != torch.strided else p.grad
        for n, p in model.named_parameters()
        if p.grad is not None
    }
    return x.grad, own, counter.get_total_flops()


@pytest.mark.parametrize("name", TARGETED)
def test_tokens_that_do_not_count_add_nothing_and_cost_nothing(name):
    model = prepared(name)
    x, dy = next(batches())
    dead = [row for row in range(TOKENS) if row not in LIVE]
    dy[dead] = 0.0
    dx, own, flops = gradients(model, x, dy)
    live_dx, live_own, live_flops = gradients(model, x[LIVE], dy[LIVE])
    assert torch.equal(dx[dead], torch.zeros(len(dead), D_IN, dtype=torch.float64))
    torch.testing.assert_close(dx[LIVE], live_dx, rtol=1e-12, atol=1e-12)
    assert own
    assert own.keys() == live_own.keys()
    for parameter, gradient in own.items():
        torch.testing.assert_close(gradient, live_own[parameter], rtol=1e-12, atol=1e-12)
    assert live_flops > 0
    assert flops == live_flops


@pytest.mark.parametrize("name", TARGETED)
def test_no_token_counts(name):
    model = prepared(name)
    x, _ = next(batches())
    dx, own, _ = gradients(model, x, torch.zeros(TOKENS, D_OUT, dtype=torch.float64))
    assert not dx.any()
    assert own
    assert not any(gradient.any() for gradient in own.values())
