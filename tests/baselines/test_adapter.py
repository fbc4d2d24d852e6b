"""What holds for every method that freezes a weight and trains something beside it; lora's own tests say it of lora."""

import copy

import pytest
import torch
from torch import nn

from baselines.adapter import BottleneckFunction
from baselines.method import Setting
from baselines.registry import get
from sparsegrad.adapted import adapted_layers

FLOAT64 = {"rtol": 1e-11, "atol": 1e-12}
# T, D_in, D_out, budget
SHAPES = [(7, 5, 11, 3), (1, 13, 2, 1), (6, 3, 3, 3)]
# As a function of what the layer holds besides X and its bias. Norms are constants to DoRA's gradient.
WEIGHTS = {
    "bitfit": lambda layer: layer.weight,
    "dora": lambda layer: rescaled(layer.weight + 2 * layer.lora_B @ layer.lora_A, layer.m),
    "lora-fa": lambda layer: layer.weight + 2 * layer.lora_B @ layer.lora_A,
    "lora-xs": lambda layer: layer.weight + layer.B @ layer.R @ layer.A,
    "pissa": lambda layer: layer.weight + layer.lora_B @ layer.lora_A,
    "qlora": lambda layer: layer.dense(torch.float64) + 2 * layer.lora_B @ layer.lora_A,
    "vera": lambda layer: layer.weight + layer.lambda_b.diag() @ layer.B @ layer.lambda_d.diag() @ layer.A,
}
DRAWN = ["dora", "lora-fa", "lora-xs", "qlora", "vera"]


def rescaled(V, m):
    return (m / V.norm(dim=1).detach()).diag() @ V


def plain(d_in, d_out, bias=True, transposed=False, dtype=torch.float64):
    """nn.Linear or transformers' Conv1D (which always has a bias), random."""
    if transposed:
        layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(d_out, d_in)
    else:
        layer = nn.Linear(d_in, d_out, bias=bias)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.to(dtype)


def adapted(name, layer, budget, moved=True, **setting):
    """The layer under the method, everything that trains moved from where it began."""
    model = nn.Sequential(layer)
    method = get(name)(None if get(name).knob is None else budget, Setting({"linear": ["0"]}, **setting))
    method.prepare(model, iter(()))
    if moved:
        for parameter in model[0].own():
            nn.init.normal_(parameter)
        if name == "dora":
            # The lengths of rows are not near zero, by which its gradient divides.
            nn.init.uniform_(model[0].m, 0.5, 2)
    return model[0]


def trained(layer):
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("name", "bias", "transposed"),
    # Without a bias bitfit has nothing to train.
    [(name, True, False) for name in WEIGHTS]
    + [(name, False, False) for name in WEIGHTS if name != "bitfit"]
    + [(name, True, True) for name in WEIGHTS],
)
@pytest.mark.parametrize(("tokens", "d_in", "d_out", "budget"), SHAPES)
def test_closed_form(name, tokens, d_in, d_out, budget, bias, transposed):
    torch.manual_seed(tokens)
    layer = adapted(name, plain(d_in, d_out, bias, transposed), budget)
    twin = copy.deepcopy(layer)
    x = torch.randn(tokens, d_in, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(tokens, d_out, dtype=torch.float64)
    y = layer(x)
    y.backward(dy)

    x_twin = x.detach().clone().requires_grad_()
    W = WEIGHTS[name](twin)
    expected = x_twin @ W.T + twin.bias if bias else x_twin @ W.T
    expected.backward(dy)
    torch.testing.assert_close(y, expected, **FLOAT64)
    torch.testing.assert_close(x.grad, x_twin.grad, **FLOAT64)
    own, theirs = trained(layer), trained(twin)
    assert len(own) == len(layer.own()) + (bias and name != "bitfit")
    for key in own:
        torch.testing.assert_close(own[key].grad, theirs[key].grad, **FLOAT64)
    merged = layer.to_linear()
    assert type(merged).__name__ == ("Conv1D" if transposed else "Linear")
    torch.testing.assert_close(merged(x), y, **FLOAT64)


# DoRA's norm moves with A and B, and is no part of its gradient: its function is checked with the norm held.
@pytest.mark.parametrize("name", [name for name in WEIGHTS if name != "dora"])
def test_gradcheck(name):
    torch.manual_seed(1)
    layer = adapted(name, plain(5, 4), 3)
    names, values = zip(*trained(layer).items(), strict=True)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)

    def outputs(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(outputs, (x, *(p.detach().clone().requires_grad_() for p in values)))


def test_both_ends_of_the_bottleneck_may_train():
    torch.manual_seed(2)
    x, W, b, A, R, B = (
        torch.randn(shape, dtype=torch.float64, requires_grad=grad)
        for shape, grad in [
            ((6, 5), True),
            ((4, 5), False),
            ((4,), True),
            ((2, 5), False),
            ((2, 2), True),
            ((4, 2), True),
        ]
    )
    assert torch.autograd.gradcheck(BottleneckFunction.apply, (x, W, b, A, R, B, 0.75))


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 3), ()])
@pytest.mark.parametrize("name", WEIGHTS)
def test_leading_dimensions_are_kept(name, shape):
    layer = adapted(name, plain(5, 7), 2)
    x = torch.randn(*shape, 5, dtype=torch.float64)
    assert layer(x).shape == (*shape, 7)
    torch.testing.assert_close(layer(x), x @ WEIGHTS[name](layer).T + layer.bias, **FLOAT64)


@pytest.mark.parametrize("adapter_dtype", ["same", "float32"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_bfloat16(name, adapter_dtype):
    torch.manual_seed(3)
    tokens, d_in, d_out = 9, 16, 8
    layer = adapted(name, plain(d_in, d_out, dtype=torch.bfloat16), 3, adapter_dtype=adapter_dtype)
    x = torch.randn(tokens, d_in, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(tokens, d_out, dtype=torch.bfloat16)
    y = layer(x)
    y.backward(dy)
    twin = copy.deepcopy(layer).double()
    x_twin = x.detach().double().requires_grad_()
    expected = x_twin @ WEIGHTS[name](twin).T + twin.bias
    expected.backward(dy.double())

    def error(found, exact):
        return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())

    # A rounding to bfloat16 is off by 2^-9 at most, and no value here goes through more than eight.
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert error(y, expected) < 8 * 2**-9
    assert error(x.grad, x_twin.grad) < 8 * 2**-9
    own_dtype = torch.float32 if adapter_dtype == "float32" and name != "bitfit" else torch.bfloat16
    theirs = trained(twin)
    for parameter_name, parameter in trained(layer).items():
        assert parameter.dtype == (torch.bfloat16 if parameter_name == "bias" else own_dtype)
        assert parameter.grad.dtype == parameter.dtype
        assert error(parameter.grad, theirs[parameter_name].grad) < 8 * 2**-9


@pytest.mark.parametrize("name", WEIGHTS)
def test_draws_come_from_the_seed_and_leave_the_global_one_alone(name):
    # Large enough for the decomposition that draws.
    source = plain(60, 50, dtype=torch.float32)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, same, other = (
        adapted(name, copy.deepcopy(source), 2, moved=False, seed=seed).state_dict() for seed in (3, 3, 4)
    )
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, same[key]) for key, value in first.items())
    if name in DRAWN:
        assert any(not torch.equal(value, other[key]) for key, value in first.items())


@pytest.mark.parametrize("name", DRAWN)
def test_layers_do_not_share_a_draw_of_their_own(name, build_model, apply):
    model = build_model("bert")
    apply(name, model, budget=3)
    (_, first), (_, second), *_ = adapted_layers(model)
    key = {"lora-xs": "R", "vera": "shared.A"}.get(name, "lora_A")
    assert torch.equal(first.state_dict()[key], second.state_dict()[key]) == (name == "vera")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", [name for name in WEIGHTS if name not in ("pissa", "qlora")])
def test_weight_and_bias_are_the_sources_own(name, transposed):
    source = plain(5, 7, transposed=transposed)
    layer = adapted(name, source, 2, moved=False)
    assert layer.weight.data_ptr() == source.weight.data_ptr()
    assert layer.bias is source.bias


@pytest.mark.parametrize(
    ("name", "budget", "expected"),
    [
        ("dora", 3, 3 * (24 + 16) + 24 + 3 * (5 + 7) + 5),
        ("lora-fa", 3, 3 * 24 + 3 * 5),
        ("lora-xs", 3, 9 + 9),
        ("pissa", 3, 3 * (24 + 16) + 3 * (5 + 7)),
        ("qlora", 3, 3 * (24 + 16) + 3 * (5 + 7)),
        ("vera", 3, 3 + 24 + 3 + 5),
    ],
)
def test_budget_params_are_what_trains(name, budget, expected):
    shapes = [(24, 16), (5, 7)]
    assert get(name)(budget, Setting({})).budget_params(shapes) == expected
    layers = [adapted(name, plain(d_in, d_out, bias=False), budget) for d_out, d_in in shapes]
    assert sum(p.numel() for layer in layers for p in trained(layer).values()) == expected


@pytest.mark.parametrize(
    ("name", "largest"), [*((name, 5) for name in ("dora", "lora-fa", "lora-xs", "pissa", "qlora")), ("vera", 35)]
)
def test_the_largest_budget(name, largest):
    assert get(name).largest_budget([(24, 16), (5, 7)]) == largest
