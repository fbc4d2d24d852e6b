"""The folded form as a method: what it converts, what its optimizer holds, and that it trains as the published one."""

import pytest
import torch

from benchmarks.harness.protocol import state_params
from sparsegrad import FoldedLinear, SparseAdam, find_layers
from sparsegrad.adapted import adapted_layers

NAME = "sparsegrad-folded"


@pytest.mark.parametrize(("budget", "kept"), [(0.1, 38), (7, 7), (1.0, 384), (None, 4)])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_every_target_keeps_its_weight_and_shares_its_kinds_bases(family, budget, kept, build_model, apply):
    model, source = build_model(family), build_model(family)
    layers = find_layers(model)
    method = apply(NAME, model, budget=budget)
    bases = []
    for names in layers.values():
        converted = [model.get_submodule(name) for name in names]
        assert all(isinstance(layer, FoldedLinear) and layer.nnz == kept for layer in converted)
        assert len({id(layer.basis) for layer in converted}) == 1
        bases += [converted[0].basis.U, converted[0].basis.V]
        for name, layer in zip(names, converted, strict=True):
            weight = source.get_submodule(name).weight
            assert torch.equal(layer.weight, weight.T if family == "gpt2" else weight)
    assert sorted(map(id, method.basis_tensors(model))) == sorted(map(id, bases))


def test_dense_moments_of_the_weights(build_model, apply, train):
    model = build_model("bert")
    method = apply(NAME, model, budget=7, train_rest="none")
    train(method, model, count=1, lr=1e-3)
    sparse, dense = method.optimizers(model, 1e-3)
    assert isinstance(sparse, SparseAdam)
    assert isinstance(dense, torch.optim.AdamW)
    weights = {id(layer.weight) for _, layer in adapted_layers(model)}
    assert {id(p) for group in sparse.param_groups for p in group["params"]} == weights
    sparse.step()
    assert state_params([sparse]) == 4 * 384


@pytest.mark.parametrize("rest", ["all", "none"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_trains_as_the_published_form_does(family, rest, build_model, apply, train, logits):
    models = {name: build_model(family, torch.float64) for name in ("sparsegrad", NAME)}
    before = logits(models[NAME])
    for name, model in models.items():
        method = apply(name, model, budget=0.1, train_rest=rest)
        train(method, model, count=5, lr=1e-2)
        method.export(model)
    published, folded = models.values()
    for names in find_layers(folded).values():
        for name in names:
            weights = (model.get_submodule(name).weight for model in (folded, published))
            torch.testing.assert_close(*weights, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(logits(folded), logits(published), rtol=1e-8, atol=1e-8)
    assert float((logits(models[NAME]) - before).abs().max()) > 1e-2
