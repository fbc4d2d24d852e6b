"""The random mask: k entries of each weight train, and nothing else of it ever moves."""

import pytest
import torch
from torch import nn

from sparsegrad import FixedLinear, TransitionMatrices
from sparsegrad.adapted import adapted_layers

FLOAT64 = {"rtol": 1e-12, "atol": 1e-13}
# T, D_in, D_out, flat positions in (D_out, D_in). The weight gradient is made in blocks of an eighth of the D_out rows,
# rounded up: 19 rows are six blocks of 3 and one of 1, 17 are five of 3 and one of 2, 3 rows are three blocks of 1.
CASES = {
    "spread": (7, 5, 19, range(0, 95, 3)),
    "all": (4, 6, 16, range(96)),
    "last block alone": (3, 5, 19, [90, 92, 94]),
    "gaps between blocks": (6, 11, 17, [0, 32, 33, 98, 99, 186]),
    "one": (1, 3, 7, [20]),
    "fewer rows than blocks": (5, 2, 3, [0, 3, 4]),
    "one row": (2, 7, 1, [1, 6]),
}


def make(d_in, d_out, positions, bias=True, dtype=torch.float64):
    """The plain weight and bias, and the masked layer."""
    linear = nn.Linear(d_in, d_out, bias=bias, dtype=dtype)
    for parameter in linear.parameters():
        nn.init.normal_(parameter)
    weight = linear.weight.detach().clone()
    index = torch.tensor(list(positions), dtype=torch.int32)
    return weight, linear.bias, FixedLinear.in_basis(linear, TransitionMatrices(None, None), index)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_gradients(case, bias):
    torch.manual_seed(0)
    tokens, d_in, d_out, positions = CASES[case]
    weight, b, layer = make(d_in, d_out, positions, bias)
    x = torch.randn(tokens, d_in, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(tokens, d_out, dtype=torch.float64)
    y = layer(x)
    y.backward(dy)
    X = x.detach()
    torch.testing.assert_close(y.detach(), X @ weight.T + (b.detach() if bias else 0), **FLOAT64)
    entries = (dy.T @ X).flatten()[list(positions)]
    torch.testing.assert_close(layer.values.grad, entries, **FLOAT64)
    torch.testing.assert_close(x.grad, dy @ weight, **FLOAT64)
    if bias:
        torch.testing.assert_close(layer.bias.grad, dy.sum(0), **FLOAT64)
    assert layer.weight.grad is None


@pytest.mark.parametrize("case", CASES)
def test_new_values_are_what_the_layer_computes_with(case):
    torch.manual_seed(2)
    tokens, d_in, d_out, positions = CASES[case]
    weight, b, layer = make(d_in, d_out, positions)
    new = torch.randn(len(positions), dtype=torch.float64)
    with torch.no_grad():
        layer.values.copy_(new)
    expected = weight.flatten()
    for position, value in zip(positions, new.tolist(), strict=True):
        expected[position] = value
    expected = expected.view(d_out, d_in)
    # Before any forward pass, and after one.
    assert torch.equal(layer.effective_weight(), expected)
    x = torch.randn(tokens, d_in, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ expected.T + b, **FLOAT64)
    assert torch.equal(layer.to_linear().weight, expected)


@pytest.mark.parametrize("shape", [(2, 3), (1, 1), ()])
def test_leading_dimensions_are_kept(shape):
    weight, b, layer = make(5, 7, [3, 9])
    x = torch.randn(*shape, 5, dtype=torch.float64)
    assert layer(x).shape == (*shape, 7)
    torch.testing.assert_close(layer(x), x @ weight.T + b, **FLOAT64)


def test_forward_may_be_repeated_before_backward():
    torch.manual_seed(3)
    positions = [0, 8, 9, 33]
    weight, _, layer = make(5, 7, positions)
    xs = [torch.randn(t, 5, dtype=torch.float64, requires_grad=True) for t in (4, 1, 3)]
    dys = [torch.randn(t, 7, dtype=torch.float64) for t in (4, 1, 3)]
    torch.autograd.backward([layer(x) for x in xs], dys)
    expected = sum((dy.T @ x.detach()).flatten()[positions] for x, dy in zip(xs, dys, strict=True))
    torch.testing.assert_close(layer.values.grad, expected, **FLOAT64)
    for x, dy in zip(xs, dys, strict=True):
        torch.testing.assert_close(x.grad, dy @ weight, **FLOAT64)


# --- the method


def weights(model, names):
    """Plain weights as (D_out, D_in)."""
    transposed = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layers = {name: model.get_submodule(name) for name in names}
    return {
        name: (layer.weight.T if isinstance(layer, transposed) else layer.weight).detach().clone()
        for name, layer in layers.items()
    }


@pytest.mark.parametrize("rest", ["all", "none"])
@pytest.mark.parametrize(("family", "budget"), [("bert", 37), ("gpt2", 0.1), ("llama", 1)])
def test_only_k_entries_ever_change(family, budget, rest, build_model, apply, train):
    model = build_model(family)
    names = [name for name, module in model.named_modules() if ".mlp.c_" in name or name.endswith("_proj")]
    names = [name for name in names if "attn" not in name]
    if family == "bert":
        names = [f"bert.encoder.layer.{i}.{part}.dense" for i in (0, 1) for part in ("intermediate", "output")]
    before = weights(model, names)
    method = apply("random-mask", model, budget=budget, train_rest=rest)
    chosen = {name: layer.index.long() for name, layer in adapted_layers(model)}
    assert sorted(chosen) == sorted(names)
    train(method, model, count=4, lr=1e-2)
    after = weights(method.export(model), names)
    for name in names:
        # 384 entries in each weight; round(38.4) of them at a density of 0.1.
        k = {37: 37, 0.1: 38, 1: 1}[budget]
        changed = (after[name] != before[name]).flatten().nonzero().squeeze(1)
        assert torch.equal(changed, chosen[name])
        assert changed.numel() == k


def supports(build_model, apply, seed):
    model = build_model("bert")
    apply("random-mask", model, budget=20, seed=seed)
    return [layer.index for _, layer in adapted_layers(model)]


def test_the_support_is_the_seeds(build_model, apply):
    first, same, other = (supports(build_model, apply, seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    # Each layer has its own.
    assert not torch.equal(first[0], first[2])
    for index in first:
        assert index.dtype == torch.int32
        assert (index.diff() > 0).all()


def test_the_support_is_spread_over_the_weight(apply):
    # 2000 of 20 000 positions: their mean is normal about 9999.5 with a standard deviation of about 122.
    model = nn.Sequential(nn.Linear(100, 200))
    apply("random-mask", model, budget=0.1, layers={"linear": ["0"]})
    mean = model[0].index.double().mean().item()
    assert abs(mean - 9999.5) < 5 * 122
    assert int(model[0].index.max()) < 20_000


def test_no_batch_is_drawn(build_model):
    from baselines.method import Setting
    from baselines.registry import get
    from sparsegrad import find_layers

    def batches():
        pytest.fail("the support is drawn without looking at any batch")
        yield

    model = build_model("bert")
    get("random-mask")(5, Setting(layers=find_layers(model))).prepare(model, batches())


def test_basis_tensors_are_the_positions(build_model, apply):
    model = build_model("bert")
    method = apply("random-mask", model, budget=5)
    found = list(method.basis_tensors(model))
    assert [id(tensor) for tensor in found] == [id(layer.index) for _, layer in adapted_layers(model)]


def test_float32_values_of_a_bfloat16_model_keep_small_updates(build_model, apply, train):
    moved = {}
    for dtype in ("same", "float32"):
        model = build_model("bert", torch.bfloat16)
        method = apply("random-mask", model, budget=7, adapter_dtype=dtype)
        layers = [layer for _, layer in adapted_layers(model)]
        before = [layer.values.detach().clone() for layer in layers]
        # Adam's first step is lr for every entry: far below a bfloat16 step of most weights, 2^-8 of the value.
        train(method, model, count=1, lr=1e-6)
        moved[dtype] = [(layer.values != old).double().mean() for layer, old in zip(layers, before, strict=True)]
        for layer in layers:
            expected = layer.values.detach().to(torch.bfloat16)
            assert torch.equal(torch.take(layer.effective_weight(), layer.index.long()), expected)
            assert layer.values.grad.dtype == layer.values.dtype
            assert layer.weight.dtype == torch.bfloat16
    assert all(share == 1 for share in moved["float32"])
    assert sum(moved["same"]) < 0.5 * len(moved["same"])
