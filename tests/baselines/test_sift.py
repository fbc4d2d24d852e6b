"""Sparse Increment Fine-Tuning: which entries train, and that nothing else of a weight moves."""

import pytest
import torch
from torch import nn

from baselines.method import MethodError, Setting
from baselines.registry import get
from baselines.sift import largest_positions
from sparsegrad import SparseGradError, find_layers
from sparsegrad.adapted import adapted_layers, is_transposed

D_IN, D_OUT, TOKENS = 7, 10, 5


def backward(model, batch):
    model(batch[0]).backward(batch[1])


def batches(scale=1.0):
    generator = torch.Generator().manual_seed(3)
    while True:
        sides = (D_IN, D_OUT)
        yield [scale * torch.randn(TOKENS, side, generator=generator, dtype=torch.float64) for side in sides]


def one_layer(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D_IN, D_OUT, bias=bias, dtype=torch.float64))


def test_positions_are_those_of_a_full_sort():
    for shape, k in (((19, 13), 40), ((1, 7), 1), ((5, 1), 5)):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        expected = sorted(gradient.flatten().abs().argsort(descending=True)[:k].tolist())
        # Stored the other way round, as a Conv1D's gradient is.
        for given in (gradient.clone(), gradient.T.contiguous().T):
            found = largest_positions(given, k)
            assert found.tolist() == expected
            assert found.dtype == torch.int32


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_the_first_gradient_alone_chooses(family, build_model, batches):
    model, twin = build_model(family), build_model(family)
    layers = find_layers(model)
    source = batches(model)
    drawn = [next(source) for _ in range(4)]
    left = iter(drawn)
    state = torch.get_rng_state()
    get("sift")(9, Setting(layers, calibration_steps=3)).prepare(model, left)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(list(left)) == 3
    twin(**drawn[0]).loss.backward()
    for name, layer in adapted_layers(model):
        plain = twin.get_submodule(name)
        gradient = plain.weight.grad.T if is_transposed(plain) else plain.weight.grad
        assert layer.index.tolist() == sorted(gradient.flatten().abs().argsort(descending=True)[:9].tolist())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("bias", [True, False])
def test_steps_are_adams_on_the_chosen_entries(bias):
    model, k, lr = one_layer(bias), 6, 0.01
    weight = model[0].weight.detach().clone()
    method = get("sift")(k, Setting({"linear": ["0"]}, backward=backward))
    method.prepare(model, batches())
    x, dy = next(batches())
    mask = torch.zeros(D_OUT * D_IN, dtype=torch.bool)
    mask[(dy.T @ x).flatten().abs().argsort(descending=True)[:k]] = True
    mask = mask.view(D_OUT, D_IN)
    optimizers = method.optimizers(model, lr)
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    stream = batches()
    for t in range(1, 5):
        x, dy = next(stream)
        model.zero_grad(set_to_none=True)
        model(x).backward(dy)
        for optimizer in optimizers:
            optimizer.step()
        g = (dy.T @ x) * mask
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        weight = weight - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    torch.testing.assert_close(method.export(model)[0].weight.detach(), weight, rtol=1e-10, atol=1e-12)
    moments = [state["exp_avg"].numel() for optimizer in optimizers for state in optimizer.state.values()]
    assert sorted(moments) == sorted([k, D_OUT] if bias else [k])


def test_no_batch():
    model = one_layer()
    with pytest.raises(MethodError, match="no gradient of '0' arrived"):
        get("sift")(3, Setting({"linear": ["0"]}, backward=backward)).prepare(model, iter(()))
    assert type(model[0]) is nn.Linear


def test_a_gradient_that_is_not_finite():
    model = one_layer()
    with pytest.raises(SparseGradError, match=r"layer '0': .*NaN or infinity"):
        get("sift")(3, Setting({"linear": ["0"]}, backward=backward)).prepare(model, batches(scale=1e300))
    assert type(model[0]) is nn.Linear


def test_the_values_keep_what_bfloat16_would_round_away(build_model, apply, train):
    model = build_model("bert", torch.bfloat16)
    method = apply("sift", model, budget=7, adapter_dtype="float32")
    layers = [layer for _, layer in adapted_layers(model)]
    before = [layer.values.detach().clone() for layer in layers]
    # Adam's first step is lr for every entry whose gradient is not tiny: far below a bfloat16 step of most weights.
    train(method, model, count=1, lr=1e-6)
    for layer, old in zip(layers, before, strict=True):
        assert layer.values.dtype == layer.values.grad.dtype == torch.float32
        assert layer.weight.dtype == torch.bfloat16
        assert (layer.values != old).all()
