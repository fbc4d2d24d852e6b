"""BitFit: what it trains, what it refuses, and that nothing of X is kept for it."""

import pytest
import torch
from torch import nn

from baselines.bitfit import BiasFunction
from baselines.method import MethodError, Setting
from baselines.registry import get
from sparsegrad import find_layers


def storages_saved(function, x):
    """Storages of the tensors that the graph keeps for backward."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        function(x)
    return {tensor.untyped_storage().data_ptr() for tensor in kept}


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)])
def test_no_more_is_kept_than_by_a_frozen_layer_of_torchs(shape):
    layer = nn.Linear(5, 4)
    layer.weight.requires_grad_(False)
    x = torch.randn(shape, requires_grad=True)
    weight = {layer.weight.data_ptr()}
    assert storages_saved(layer, x) == weight
    rows = x.detach().view(-1, 5).requires_grad_()
    assert storages_saved(lambda rows: BiasFunction.apply(rows, layer.weight, layer.bias), rows) == weight
    # So it is X that a weight which trains adds.
    layer.weight.requires_grad_(True)
    assert storages_saved(layer, x) == weight | {x.data_ptr()}


@pytest.mark.parametrize("rest", ["all", "none"])
def test_what_trains(rest, build_model, apply):
    model = build_model("bert")
    targets = [name for names in find_layers(model).values() for name in names]
    weights, biases = ({f"{name}.{end}" for name in targets} for end in ("weight", "bias"))
    everything = {name for name, _ in model.named_parameters()}
    apply("bitfit", model, train_rest=rest)
    found = {name for name, p in model.named_parameters() if p.requires_grad}
    assert found == (everything - weights if rest == "all" else biases | {"classifier.weight", "classifier.bias"})
    assert {name for name, _ in model.named_parameters()} == everything


def test_where_no_target_has_a_bias_it_is_refused(build_model, apply):
    model = build_model("llama")
    before = {name: (p.requires_grad, type(p)) for name, p in model.named_parameters()}
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(MethodError, match=r"none of the 6 has one \('model.layers.0.mlp.gate_proj' for one\)"):
        apply("bitfit", model)
    assert {name: (p.requires_grad, type(p)) for name, p in model.named_parameters()} == before
    assert [type(module) for module in model.modules()] == kinds


def test_where_some_have_one_those_train_and_none_is_added():
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3))
    method = get("bitfit")(None, Setting({"up": ["0"], "down": ["1"]}, train_rest="none"))
    method.prepare(model, iter(()))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["1.bias"]
    x = torch.randn(2, 4, requires_grad=True)
    y = model(x)
    torch.testing.assert_close(y, x @ model[0].weight.T @ model[1].weight.T + model[1].bias)
    y.sum().backward()
    torch.testing.assert_close(model[1].bias.grad, torch.full((3,), 2.0))
    exported = method.export(model)
    assert exported[0].bias is None
    torch.testing.assert_close(exported(x), y)
