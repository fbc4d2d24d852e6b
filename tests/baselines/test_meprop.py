"""MeProp against its three definitions, written out in plain loops over float64 numbers."""

import math

import pytest
import torch
from torch import nn

from baselines.meprop import FUNCTIONS, MePropLinear
from sparsegrad.adapted import adapted_layers

# T, D_in, D_out
SHAPES = [(7, 5, 11), (1, 13, 3), (5, 2, 2), (4, 7, 6)]
KEEPS = ["example", "unified", "weight"]
FLOAT64 = {"rtol": 1e-12, "atol": 1e-13}


def budgets(keep, d_in, d_out):
    """One, some, all."""
    most = d_out * d_in if keep == "weight" else d_out
    return sorted({1, math.ceil(most / 3), most})


CASES = [(keep, *shape, k) for keep in KEEPS for shape in SHAPES for k in budgets(keep, *shape[1:])]


def largest(magnitudes, k):
    """Positions of the k largest."""
    return set(sorted(range(len(magnitudes)), key=lambda i: -magnitudes[i])[:k])


def product(a, b):
    """a (M, N) times b (N, P), as lists."""
    return [[sum(a[i][n] * b[n][j] for n in range(len(b))) for j in range(len(b[0]))] for i in range(len(a))]


def meprop_by_loops(keep, k, x, weight, dy):
    """dL/dX (T, D_in), dL/dW (D_out, D_in), dL/db (D_out,), from lists of lists.

    Sun et al. (2017): the top k of dL/dY of each example, or the k outputs whose magnitudes over the minibatch sum to
    the most, enter both products. The SparseGrad paper: the top k of dL/dW. The bias has the ordinary gradient.
    """
    tokens, d_out = len(dy), len(weight)
    kept = [list(row) for row in dy]
    if keep == "example":
        for row in kept:
            stay = largest([abs(value) for value in row], k)
            for o in range(d_out):
                row[o] = row[o] if o in stay else 0.0
    if keep == "unified":
        stay = largest([sum(abs(dy[t][o]) for t in range(tokens)) for o in range(d_out)], k)
        for row in kept:
            for o in range(d_out):
                row[o] = row[o] if o in stay else 0.0
    dx = product(kept, weight)
    dweight = product([list(column) for column in zip(*kept, strict=True)], x)
    if keep == "weight":
        flat = [abs(value) for row in dweight for value in row]
        stay = largest(flat, k)
        d_in = len(x[0])
        dweight = [[v if o * d_in + i in stay else 0.0 for i, v in enumerate(row)] for o, row in enumerate(dweight)]
    dbias = [sum(dy[t][o] for t in range(tokens)) for o in range(d_out)]
    return dx, dweight, dbias


def make(d_in, d_out, keep, k, bias=True):
    """A plain random layer in float64 and its MeProp twin, which shares its parameters' values."""
    linear = nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64)
    for parameter in linear.parameters():
        nn.init.normal_(parameter)
    layer = MePropLinear(linear, keep, k)
    plain = nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64)
    plain.load_state_dict(linear.state_dict())
    return plain, layer


def tensors(tokens, d_in, d_out):
    x = torch.randn(tokens, d_in, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(tokens, d_out, dtype=torch.float64)


def check_against_loops(layer, keep, k, x, dy):
    layer(x).backward(dy)
    expected = meprop_by_loops(keep, k, x.tolist(), layer.weight.tolist(), dy.tolist())
    dx, dweight, dbias = (torch.tensor(value, dtype=torch.float64) for value in expected)
    torch.testing.assert_close(x.grad, dx, **FLOAT64)
    torch.testing.assert_close(layer.weight.grad.to_dense(), dweight, **FLOAT64)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, dbias, **FLOAT64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("keep", "tokens", "d_in", "d_out", "k"), CASES)
def test_definition(keep, tokens, d_in, d_out, k, bias):
    torch.manual_seed(tokens)
    _, layer = make(d_in, d_out, keep, k, bias)
    check_against_loops(layer, keep, k, *tensors(tokens, d_in, d_out))


@pytest.mark.parametrize("keep", KEEPS)
def test_definition_with_stripes_of_zeros(keep):
    # Rows of padding, and outputs that no token uses.
    torch.manual_seed(0)
    _, layer = make(5, 7, keep, 3)
    x, dy = tensors(6, 5, 7)
    dy[[0, 3, 4]] = 0
    dy[:, [1, 6]] = 0
    check_against_loops(layer, keep, 3, x, dy)


def test_weight_keeps_every_entry_that_can_be_non_zero():
    # Two outputs have a gradient: 10 entries of dL/dW are not zero, fewer than the 13 to be kept.
    torch.manual_seed(0)
    _, layer = make(5, 7, "weight", 13)
    x, dy = tensors(4, 5, 7)
    dy[:, [0, 1, 3, 5, 6]] = 0
    check_against_loops(layer, "weight", 13, x, dy)
    assert layer.weight.grad._nnz() == 13


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 1), ()])
def test_outputs_are_the_plain_layers(keep, shape):
    torch.manual_seed(1)
    for bias in (True, False):
        plain, layer = make(5, 7, keep, 1, bias)
        x = torch.randn(*shape, 5, dtype=torch.float64)
        assert layer(x).shape == (*shape, 7)
        torch.testing.assert_close(layer(x), plain(x), **FLOAT64)


class Densify(torch.autograd.Function):
    """The identity, whose gradient gradcheck can read."""

    @staticmethod
    def forward(ctx, weight):
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to_dense()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("keep", KEEPS)
def test_gradcheck_where_all_is_kept(keep, bias):
    torch.manual_seed(3)

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    k = budgets(keep, 3, 5)[-1]

    def function(x, weight, bias):
        return FUNCTIONS[keep].apply(x, Densify.apply(weight), bias, k)

    assert torch.autograd.gradcheck(function, (leaf(4, 3), leaf(5, 3), leaf(5) if bias else None))


def test_layouts_of_the_weight_gradient():
    torch.manual_seed(4)
    x, dy = tensors(6, 5, 7)
    gradients = {}
    for keep, k in (("example", 2), ("unified", 2), ("weight", 9)):
        _, layer = make(5, 7, keep, k)
        layer(x).backward(dy)
        gradients[keep] = layer.weight.grad
    assert gradients["example"].layout == torch.strided
    unified, weight = gradients["unified"], gradients["weight"]
    # torch drops the flag that says "coalesced" when it stores a gradient; ascending positions are what it stands for.
    assert unified.is_sparse
    assert (unified._indices().shape, unified._values().shape) == ((1, 2), (2, 5))
    assert unified._indices()[0, 0] < unified._indices()[0, 1]
    assert weight.is_sparse
    assert (weight._indices().shape, weight._values().shape) == ((2, 9), (9,))
    flat = weight._indices()[0] * 5 + weight._indices()[1]
    assert (flat.diff() > 0).all()


@pytest.mark.parametrize("keep", KEEPS)
def test_a_layer_used_twice_adds_its_gradients_up(keep):
    torch.manual_seed(5)
    k = 4 if keep == "weight" else 2
    _, layer = make(5, 7, keep, k)
    (x1, dy1), (x2, dy2) = tensors(3, 5, 7), tensors(4, 5, 7)
    torch.autograd.backward([layer(x1), layer(x2)], [dy1, dy2])
    each = [
        meprop_by_loops(keep, k, x.tolist(), layer.weight.tolist(), dy.tolist()) for x, dy in [(x1, dy1), (x2, dy2)]
    ]
    expected = sum(torch.tensor(dweight, dtype=torch.float64) for _, dweight, _ in each)
    torch.testing.assert_close(layer.weight.grad.to_dense(), expected, **FLOAT64)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_weight_is_the_sources_and_returns_to_its_kind(transposed):
    if transposed:
        source = pytest.importorskip("transformers.pytorch_utils").Conv1D(7, 5)
    else:
        source = nn.Linear(5, 7)
    before = source.weight.detach().clone()
    layer = MePropLinear(source, "weight", 3)
    assert layer.weight.shape == (7, 5)
    assert layer.weight.is_contiguous()
    assert layer.bias is source.bias
    if not transposed:
        assert layer.weight.data_ptr() == source.weight.data_ptr()
    plain = layer.to_linear()
    assert type(plain) is type(source)
    assert torch.equal(plain.weight, before)


# --- the methods


@pytest.mark.parametrize(
    ("name", "budget", "expected"),
    [
        ("meprop-example", 5, {(24, 16): 5, (16, 24): 5}),
        ("meprop-unified", 5, {(24, 16): 5, (16, 24): 5}),
        ("meprop-weight", 5, {(24, 16): 5, (16, 24): 5}),
        ("meprop-weight", 0.1, {(24, 16): 38, (16, 24): 38}),  # round(38.4)
    ],
)
def test_every_target_layer_has_its_k(name, budget, expected, build_model, apply):
    model = build_model("bert")
    apply(name, model, budget=budget)
    layers = [layer for _, layer in adapted_layers(model)]
    assert len(layers) == 4
    for layer in layers:
        assert layer.keep == name.removeprefix("meprop-")
        assert layer.k == expected[tuple(layer.weight.shape)]


@pytest.mark.parametrize(
    ("name", "budget", "rows"), [("meprop-unified", 3, True), ("meprop-weight", 29, False), ("meprop-weight", 1, False)]
)
def test_a_step_writes_only_what_is_kept(name, budget, rows, build_model, apply, train):
    model = build_model("bert", torch.float64)
    method = apply(name, model, budget=budget)
    before = {key: layer.weight.detach().clone() for key, layer in adapted_layers(model)}
    train(method, model, count=1, lr=1e-2)
    for key, layer in adapted_layers(model):
        changed = layer.weight.detach() != before[key]
        assert int(changed.sum()) == (budget * layer.in_features if rows else budget)
        if rows:
            assert int(changed.any(1).sum()) == budget
