"""PiSSA: where A, B and the frozen rest begin, and peft's."""

import pytest
import torch
from torch import nn

from baselines.pissa import PiSSALinear


def begun(d_in, d_out, rank, alpha=None, dtype=torch.float64, adapter_dtype=None):
    source = nn.Linear(d_in, d_out, dtype=dtype)
    before = source.weight.detach().clone()
    return PiSSALinear(source, rank, alpha or rank, adapter_dtype), before, source


@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(5, 11, 3), (13, 2, 1), (6, 6, 6)])
@pytest.mark.parametrize("scaling", [1.0, 2.0])
def test_what_trains_is_the_best_approximation_and_the_rest_is_frozen(d_in, d_out, rank, scaling):
    torch.manual_seed(0)
    layer, W, _ = begun(d_in, d_out, rank, scaling * rank)
    values = torch.linalg.svdvals(W)
    product = layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach()
    # Eckart and Young: no matrix of this rank leaves less.
    torch.testing.assert_close((W - product).norm(), values[rank:].norm(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.weight.detach(), W - product, rtol=1e-12, atol=1e-13)
    # Both factors carry the root of a singular value.
    for factor in (layer.lora_A.detach(), layer.lora_B.detach().T):
        torch.testing.assert_close(factor @ factor.T, (values[:rank] / scaling).diag(), rtol=1e-10, atol=1e-10)
    assert not layer.weight.requires_grad
    torch.testing.assert_close(layer.effective_weight(), W, rtol=1e-12, atol=1e-13)


def test_the_sources_weight_stays_as_it_was():
    # Another module may be tied to it.
    layer, W, source = begun(5, 7, 2)
    assert torch.equal(source.weight, W)
    assert layer.weight.untyped_storage().data_ptr() != source.weight.untyped_storage().data_ptr()
    assert layer.bias is source.bias


@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
def test_in_bfloat16_the_rest_makes_up_for_what_the_factors_lost(adapter_dtype):
    torch.manual_seed(1)
    layer, W, _ = begun(40, 30, 4, dtype=torch.bfloat16, adapter_dtype=adapter_dtype)
    A, B = (each.detach().to(torch.bfloat16).double() for each in (layer.lora_A, layer.lora_B))
    rest = layer.weight.detach().double()
    # W_res is rounded once or twice, to 2^-9 of its entries; the factors' own rounding is not in the sum.
    lost = (rest + B @ A - W.double()).abs()
    assert (lost <= 2 * 2**-9 * (rest.abs() + (B @ A).abs())).all()
    assert float(lost.norm() / W.double().norm()) < 2**-9


def test_equals_peft():
    peft = pytest.importorskip("peft")
    # peft decomposes float32 alone.
    torch.manual_seed(4)
    source = nn.Linear(13, 7)
    ours = PiSSALinear(source, 3, 3)
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["0"], init_lora_weights="pissa")
    model = peft.get_peft_model(nn.Sequential(source), config)
    theirs = model.base_model.model[0]
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    near = {"rtol": 1e-5, "atol": 1e-6}
    # Each direction's sign is free.
    torch.testing.assert_close(ours.lora_B @ ours.lora_A, B @ A, **near)
    torch.testing.assert_close(ours.lora_A.abs(), A.abs(), **near)
    torch.testing.assert_close(ours.weight, theirs.base_layer.weight, check_stride=False, **near)
    with torch.no_grad():
        ours.lora_A.copy_(A)
        ours.lora_B.copy_(B)
    x = torch.randn(6, 13, requires_grad=True)
    x_theirs = x.detach().clone().requires_grad_()
    dy = torch.randn(6, 7)
    y, y_theirs = ours(x), model(x_theirs)
    y.backward(dy)
    y_theirs.backward(dy)
    torch.testing.assert_close(y, y_theirs, **near)
    torch.testing.assert_close(x.grad, x_theirs.grad, **near)
    torch.testing.assert_close(ours.lora_A.grad, A.grad, **near)
    torch.testing.assert_close(ours.lora_B.grad, B.grad, **near)
