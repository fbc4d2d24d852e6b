"""SparseGrad without dense tensors: which side is rotated, what the optimizer holds, and what the layer computes."""

import pytest
import torch
from torch import nn

from baselines.method import Setting
from baselines.registry import get
from baselines.sparsegrad_compact import CAPACITY
from benchmarks.harness.protocol import state_params
from sparsegrad import SparseAdam, SparseGradLinear, find_layers
from sparsegrad.adapted import adapted_layers

NAME = "sparsegrad-compact"


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_the_smaller_side_is_rotated(family, build_model, apply):
    model = build_model(family)
    layers = find_layers(model)
    method = apply(NAME, model, budget=0.1)
    for names in layers.values():
        bases = {id(model.get_submodule(name).basis): model.get_submodule(name) for name in names}
        (layer,) = bases.values()  # one for all layers of a kind
        assert isinstance(layer, SparseGradLinear)
        assert layer.blocks == 8
        rotated = layer.basis.U if layer.in_features < layer.out_features else layer.basis.V
        assert rotated.shape == (16, 16)
        other = layer.basis.V if layer.in_features < layer.out_features else layer.basis.U
        assert other is None
    assert [tensor.shape for tensor in method.basis_tensors(model)] == [(16, 16)] * len(layers)


def test_a_square_weight_has_its_inputs_rotated():
    model = nn.Sequential(nn.Linear(6, 6))
    setting = Setting({"linear": ["0"]}, calibration_steps=2, backward=lambda model, x: model(x).sum().backward())
    get(NAME)(5, setting).prepare(model, iter(torch.randn(2, 4, 6)))
    assert model[0].basis.V is None
    assert model[0].basis.U.shape == (6, 6)


@pytest.mark.parametrize(("budget", "kept"), [(0.1, 38), (7, 7), (200, 200)])
def test_moments_of_some_entries(budget, kept, build_model, apply, train):
    model = build_model("bert")
    method = apply(NAME, model, budget=budget, train_rest="none")
    train(method, model, count=3, lr=1e-3)
    sparse, dense = optimizers = method.optimizers(model, 1e-3)
    assert isinstance(sparse, SparseAdam)
    assert isinstance(dense, torch.optim.AdamW)
    weights = {id(layer.weight) for _, layer in adapted_layers(model)}
    assert {id(p) for group in sparse.param_groups for p in group["params"]} == weights
    assert all(p.grad._nnz() == kept for group in sparse.param_groups for p in group["params"])
    for optimizer in optimizers:
        optimizer.step()
    # Four weights of 384 entries, and the classifier's 3 x 16 with a bias of 3.
    assert state_params([sparse]) == 4 * min(384, CAPACITY * kept)
    assert state_params(optimizers) == 4 * min(384, CAPACITY * kept) + 3 * 16 + 3


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_gradients_are_the_largest_of_the_rotated_ones(family, build_model, batches, apply):
    model, plain = build_model(family, torch.float64), build_model(family, torch.float64)
    names = [name for of_kind in find_layers(plain).values() for name in of_kind]
    apply(NAME, model, budget=50)
    batch = next(batches(model))
    for each in (model, plain):
        each(**batch).loss.backward()
    for name in names:
        layer, source = model.get_submodule(name), plain.get_submodule(name)
        gradient = source.weight.grad if isinstance(source, nn.Linear) else source.weight.grad.T
        basis = layer.basis
        rotated = gradient @ basis.U.T if basis.V is None else basis.V @ gradient
        kept = rotated.flatten().abs().sort(descending=True).indices[:50]
        expected = torch.zeros(rotated.numel(), dtype=torch.float64)
        expected[kept] = rotated.flatten()[kept]
        torch.testing.assert_close(layer.weight.grad.to_dense().flatten(), expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(layer.bias.grad, source.bias.grad, rtol=1e-9, atol=1e-12)


def test_export_is_exact(build_model, apply, train, logits):
    model = build_model("gpt2", torch.float64)
    method = apply(NAME, model, budget=0.2)
    train(method, model, count=3, lr=1e-2)
    before = logits(model)
    assert not any(adapted_layers(method.export(model)))
    torch.testing.assert_close(logits(model), before, rtol=1e-12, atol=1e-12)
