"""QLoRA: LoRA beside a weight in four bits; what holds for every adapter is in test_adapter.py."""

import copy

import pytest
import torch
from torch import nn

from baselines import nf4
from baselines.lora import LoRALinear
from baselines.method import Setting
from baselines.qlora import CODES
from baselines.registry import get
from sparsegrad.adapted import adapted_layers

FLOAT64 = {"rtol": 1e-12, "atol": 1e-13}


def test_it_is_lora_on_the_weight_in_four_bits(build_model, apply, batches):
    """Outputs and gradients of a model, whose targets the twin has in four bits before LoRA is put beside them."""
    model = build_model("bert", torch.float64)
    twin = copy.deepcopy(model)
    apply("qlora", model, budget=3)
    tables = nf4.Tables.made(torch.device("cpu"))
    for name, _ in adapted_layers(model):
        weight = twin.get_submodule(name).weight.data
        weight.copy_(nf4.dequantize(nf4.quantize(weight, tables), tables, tuple(weight.shape), weight.dtype))
    apply("lora", twin, budget=3)
    for each in (model, twin):
        for _, layer in adapted_layers(each):
            nn.init.constant_(layer.lora_B, 0.01)
    batch = next(batches(model))
    losses = [each(**batch).loss for each in (model, twin)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, **FLOAT64)
    theirs = dict(twin.named_parameters())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == {name for name, p in theirs.items() if p.requires_grad}
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, **FLOAT64)


@pytest.mark.parametrize(("d_out", "d_in"), [(24, 16), (7, 13), (128, 96)])
def test_it_holds_less_than_lora_by_what_four_bits_save(d_out, d_in):
    lora, qlora = (get(name)(3, Setting({})).formula((d_out, d_in), 10, torch.bfloat16) for name in ("lora", "qlora"))
    assert lora.parameter - qlora.parameter == 2 * d_out * d_in - nf4.stored_bytes(d_out * d_in)
    assert (lora.gradient, lora.optimizer, lora.activation) == (qlora.gradient, qlora.optimizer, qlora.activation)
    assert qlora.basis == sum(t.numel() * t.element_size() for t in nf4.Tables.made(torch.device("cpu")).tensors())


def test_nothing_of_the_weights_size_is_kept(build_model, apply):
    model = build_model("llama", torch.bfloat16)
    sizes = {name: layer.weight.numel() for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    total = sum(p.numel() for p in model.parameters())
    method = apply("qlora", model, budget=2)
    shapes = []
    for name, layer in adapted_layers(model):
        shapes.append((layer.out_features, layer.in_features))
        assert not hasattr(layer, "weight")
        held = sum(getattr(layer, part).nbytes for part in CODES)
        assert held == nf4.stored_bytes(sizes[name])
        assert not any(getattr(layer, part).requires_grad for part in CODES)
    own = sum(layer.lora_A.numel() + layer.lora_B.numel() for _, layer in adapted_layers(model))
    # A weight counts the entries that it stands for.
    assert method.counts(model, shapes).total_params == total + own
    # One set of tables for all layers.
    assert len({tensor.data_ptr() for tensor in method.basis_tensors(model)}) == 3


def test_only_what_lora_keeps_is_saved_for_backward():
    layer = nn.Linear(32, 48)
    model = nn.Sequential(layer)
    get("qlora")(3, Setting({"linear": ["0"]})).prepare(model, iter(()))
    saved = []

    def pack(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(5, 32, requires_grad=True))
    assert sorted(saved) == sorted([(5, 32), (3, 32), (48, 3), (5, 3)])


def test_it_is_saved_and_loaded():
    source = nn.Linear(20, 12)
    models = [nn.Sequential(copy.deepcopy(source)) for _ in range(2)]
    nn.init.normal_(models[1][0].weight)
    for seed, model in enumerate(models):
        get("qlora")(3, Setting({"linear": ["0"]}, seed=seed)).prepare(model, iter(()))
    first, second = models
    nn.init.normal_(first[0].lora_B)
    x = torch.randn(4, 20)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_the_exported_layer_is_dense_and_in_the_models_dtype():
    model = nn.Sequential(nn.Linear(20, 12, dtype=torch.bfloat16))
    method = get("qlora")(3, Setting({"linear": ["0"]}, adapter_dtype="float32"))
    method.prepare(model, iter(()))
    nn.init.normal_(model[0].lora_B)
    weight = (model[0].dense(torch.float64) + 2 * model[0].lora_B.double() @ model[0].lora_A.double()).detach()
    exported = method.export(model)[0]
    assert type(exported) is nn.Linear
    assert exported.weight.dtype == torch.bfloat16
    # Rounded three times, from both terms and their sum.
    error = (exported.weight.double() - weight).norm() / weight.norm()
    assert float(error.detach()) < 3 * 2**-9
    assert not isinstance(exported, LoRALinear)


def test_a_cast_leaves_the_weight_as_it_is():
    model = nn.Sequential(nn.Linear(20, 12))
    method = get("qlora")(3, Setting({"linear": ["0"]}))
    method.prepare(model, iter(()))
    before = model[0].dense(torch.float64)
    model.to(torch.bfloat16)
    assert torch.equal(model[0].dense(torch.float64), before)
    assert model(torch.randn(4, 20, dtype=torch.bfloat16)).dtype == torch.bfloat16
    # B is zero: the exported weight is W4, rounded once.
    assert torch.equal(method.export(model)[0].weight, before.bfloat16())


def test_a_move_takes_the_tables_along():
    model = nn.Sequential(nn.Linear(20, 12))
    get("qlora")(3, Setting({"linear": ["0"]})).prepare(model, iter(()))
    assert model.to("meta")(torch.empty(4, 20, device="meta")).shape == (4, 12)
    assert {tensor.device.type for tensor in model[0].tables.tensors()} == {"meta"}
