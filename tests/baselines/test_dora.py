"""DoRA: its norm, where its gradient begins and rests, and peft's."""

import copy

import pytest
import torch
from torch import nn

from baselines.dora import DoRAFunction, DoRALinear

FLOAT64 = {"rtol": 1e-11, "atol": 1e-12}


def adapted(d_in, d_out, rank, dtype=torch.float64, adapter_dtype=None, size=0.5, bias=True):
    layer = DoRALinear(nn.Linear(d_in, d_out, bias=bias, dtype=dtype), rank, 2 * rank, adapter_dtype)
    nn.init.normal_(layer.lora_B, std=size)
    return layer


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_with_the_norm_held(bias):
    torch.manual_seed(1)

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    weight, norm = torch.randn(3, 5, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5
    inputs = (leaf(9, 5), weight, leaf(3) if bias else None, leaf(2, 5), leaf(3, 2), leaf(3), norm, 0.75)
    assert torch.autograd.gradcheck(DoRAFunction.apply, inputs)


@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(5, 11, 3), (13, 2, 1), (40, 64, 7)])
@pytest.mark.parametrize("size", [0.0, 0.01, 10.0])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_the_norm_is_that_of_the_rows(d_in, d_out, rank, size, dtype, error):
    torch.manual_seed(rank)
    layer = adapted(d_in, d_out, rank, dtype, size=size)
    W, A, B = (t.detach().double() for t in (layer.weight, layer.lora_A, layer.lora_B))
    torch.testing.assert_close(layer.norm().double(), (W + 2 * B @ A).norm(dim=1), rtol=error, atol=0)


def test_an_update_that_takes_most_of_the_weight_away_costs_the_norm_what_it_cancels():
    # V is a hundredth of W: of its square a ten-thousandth is left, and as much more is seen of the rounding of four
    # terms.
    torch.manual_seed(0)
    layer = adapted(40, 30, 30, torch.float32)
    with torch.no_grad():
        U, S, Vt = torch.linalg.svd(layer.weight, full_matrices=False)
        layer.lora_B.copy_(-0.99 / 2 * U * S)
        layer.lora_A.copy_(Vt)
    W, A, B = (t.detach().double() for t in (layer.weight, layer.lora_A, layer.lora_B))
    torch.testing.assert_close(layer.norm().double(), (W + 2 * B @ A).norm(dim=1), rtol=4e4 * 2**-24, atol=0)


@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_at_first_every_row_has_its_own_length_exactly(dtype, adapter_dtype):
    layer = adapted(24, 50, 3, dtype, adapter_dtype, size=0.0)
    assert (layer.m / layer.norm() == 1).all()


def test_the_length_of_a_row_is_m_whatever_a_and_b_are():
    torch.manual_seed(2)
    layer = adapted(9, 6, 2, size=3.0)
    with torch.no_grad():
        layer.m.uniform_(0.5, 2)
    torch.testing.assert_close(layer.effective_weight().norm(dim=1), layer.m.detach(), **FLOAT64)


def test_a_row_of_zeros_stays_one_and_an_m_of_zero_rests():
    torch.manual_seed(3)
    linear = nn.Linear(5, 4)
    nn.init.zeros_(linear.weight[1])
    layer = DoRALinear(linear, 2, 4)
    with torch.no_grad():
        layer.m[2] = 0
    x = torch.randn(3, 5, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y[:, 1:3], linear.bias[1:3].expand(3, 2))
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in (x, *layer.own()))
    assert layer.m.grad[[1, 2]].tolist() == [0, 0]
    assert layer.m.grad[[0, 3]].all()


@pytest.mark.parametrize(("bias", "transposed"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize(("tokens", "d_in", "d_out", "rank"), [(7, 5, 11, 3), (1, 13, 2, 1)])
def test_equals_peft(tokens, d_in, d_out, rank, bias, transposed):
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    source = nn.Linear(d_in, d_out, bias=bias)
    if transposed:
        source = pytest.importorskip("transformers.pytorch_utils").Conv1D(d_out, d_in)
    source.double()
    config = peft.LoraConfig(
        r=rank, lora_alpha=3, target_modules=["0"], use_dora=True, fan_in_fan_out=transposed, bias="lora_only"
    )
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(source)), config)
    theirs = model.base_model.model[0]
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    m = theirs.lora_magnitude_vector["default"].weight
    ours = DoRALinear(source, rank, 3)
    torch.testing.assert_close(ours.m, m, **FLOAT64)
    with torch.no_grad():
        nn.init.normal_(B)
        m.uniform_(0.5, 2)
        for own, its in zip(ours.own(), (A, B, m), strict=True):
            own.copy_(its)
    x = torch.randn(tokens, d_in, dtype=torch.float64, requires_grad=True)
    x_theirs = x.detach().clone().requires_grad_()
    dy = torch.randn(tokens, d_out, dtype=torch.float64)
    y, y_theirs = ours(x), model(x_theirs)
    y.backward(dy)
    y_theirs.backward(dy)
    torch.testing.assert_close(y, y_theirs, **FLOAT64)
    torch.testing.assert_close(x.grad, x_theirs.grad, **FLOAT64)
    for own, its in zip(ours.own(), (A, B, m), strict=True):
        torch.testing.assert_close(own.grad, its.grad, **FLOAT64)
    if bias:
        torch.testing.assert_close(ours.bias.grad, theirs.base_layer.bias.grad, **FLOAT64)
    model.merge_and_unload()
    torch.testing.assert_close(ours.to_linear().weight, model.base_model.model[0].weight, **FLOAT64)
