"""LoRA-FA: LoRA with A frozen, by our own LoRA and by peft's."""

import copy

import pytest
import torch
from torch import nn

from baselines.lora_fa import LoRAFALinear
from baselines.method import Setting
from baselines.registry import get
from sparsegrad.adapted import adapted_layers

FLOAT64 = {"rtol": 1e-12, "atol": 1e-13}


def test_a_is_loras_and_stays(build_model, apply, train):
    models = {name: build_model("bert") for name in ("lora", "lora-fa")}
    methods = {name: apply(name, model, budget=3, seed=2) for name, model in models.items()}
    drawn = [layer.lora_A.detach().clone() for _, layer in adapted_layers(models["lora"])]
    train(methods["lora-fa"], models["lora-fa"], count=2, lr=1e-2)
    for A, (_, layer) in zip(drawn, adapted_layers(models["lora-fa"]), strict=True):
        assert torch.equal(layer.lora_A, A)
        assert layer.lora_B.any()


def test_it_holds_less_than_lora_by_what_a_trained_a_takes():
    # Between steps by A's two moments; in a step by A's gradient too, and by X where the layer before does not hold it.
    rank, d_in = 3, 16
    lora, fa = (get(name)(rank, Setting({})).formula((24, d_in), 10, torch.float32) for name in ("lora", "lora-fa"))
    A = 4 * rank * d_in
    assert lora.resident - fa.resident == 2 * A
    assert lora.gradient - fa.gradient == A
    assert lora.activation == fa.activation
    assert (lora.keeps_input, fa.keeps_input) == (True, False)


@pytest.mark.parametrize("bias", [True, False])
def test_equals_pefts_lora_with_a_frozen(bias):
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    source = nn.Linear(13, 7, bias=bias, dtype=torch.float64)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], bias="lora_only")
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(source)), config)
    theirs = model.base_model.model[0]
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    A.requires_grad_(False)
    nn.init.normal_(B)
    ours = LoRAFALinear(source, 3, 5)
    with torch.no_grad():
        ours.lora_A.copy_(A)
        ours.lora_B.copy_(B)
    x = torch.randn(6, 13, dtype=torch.float64, requires_grad=True)
    x_theirs = x.detach().clone().requires_grad_()
    dy = torch.randn(6, 7, dtype=torch.float64)
    y, y_theirs = ours(x), model(x_theirs)
    y.backward(dy)
    y_theirs.backward(dy)
    torch.testing.assert_close(y, y_theirs, **FLOAT64)
    torch.testing.assert_close(x.grad, x_theirs.grad, **FLOAT64)
    torch.testing.assert_close(ours.lora_B.grad, B.grad, **FLOAT64)
    if bias:
        torch.testing.assert_close(ours.bias.grad, theirs.base_layer.bias.grad, **FLOAT64)
