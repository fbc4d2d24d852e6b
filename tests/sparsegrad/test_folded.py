"""FoldedLinear against the linear layer it is, the closed form `V (dL/dY)^T X U^T`, and the published form's steps."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sparsegrad import (
    FoldedLinear,
    SparseAdam,
    SparseGradError,
    SparseGradLinear,
    TransitionMatrices,
    calibrate,
    convert_folded,
    find_layers,
    merge,
)
from sparsegrad.adapted import adapted_layers
from sparsegrad.folded import FoldedFunction, add_from_basis, gradient_in_basis, largest

# (D_out, D_in): prime, wide and tall, a single row or column.
SHAPES = [(7, 5), (5, 11), (1, 3), (3, 1), (1, 1)]
WITHOUT = ["", "U", "V", "UV"]


@pytest.fixture
def make(orthogonal):
    """A linear layer, the folded layer of a copy of it, and the bases in float64 (where one is None: the identity)."""

    def build(d_out=7, d_in=5, *, bias=True, dtype=torch.float64, without="", nnz=None):
        linear = nn.Linear(d_in, d_out, bias=bias, dtype=dtype)
        U = None if "U" in without else orthogonal(d_in, dtype)
        V = None if "V" in without else orthogonal(d_out, dtype)
        layer = FoldedLinear(copy.deepcopy(linear), TransitionMatrices(U, V), nnz=nnz or d_out * d_in)
        U = torch.eye(d_in) if U is None else U
        V = torch.eye(d_out) if V is None else V
        return SimpleNamespace(linear=linear, layer=layer, U=U.double(), V=V.double())

    return build


def dense(parameter):
    return parameter.grad.to_dense()


def by_sorting(matrix, count):
    """The rising flat positions of the largest magnitudes, by sorting all of them."""
    return matrix.abs().flatten().sort(descending=True, stable=True).indices[:count].sort().values


# Values and gradients


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("without", WITHOUT)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 6, 13])  # fewer than either side, between them, and more
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_are_the_closed_forms(make, distance, shape, tokens, bias, without, dtype, rounding):
    made = make(*shape, bias=bias, dtype=dtype, without=without)
    x = torch.randn(tokens, shape[1], dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, shape[0], dtype=dtype)
    y = made.layer(x)
    y.backward(dy)
    wide_x, wide_dy, weight = x.detach().double(), dy.double(), made.linear.weight.detach().double()
    assert y.dtype == x.grad.dtype == made.layer.weight.grad.dtype == dtype
    assert made.layer.weight.grad.layout == torch.sparse_coo
    assert distance(y, wide_x @ weight.T + (made.linear.bias.detach().double() if bias else 0)) < rounding
    assert distance(x.grad, wide_dy @ weight) < rounding
    assert distance(dense(made.layer.weight), made.V @ wide_dy.T @ wide_x @ made.U.T) < rounding
    if bias:
        assert distance(made.layer.bias.grad, wide_dy.sum(0)) < rounding


class OutOfBasis(torch.autograd.Function):
    """`W = V^T W~ U`, whose incoming gradient is in the basis already: it is W~'s."""

    @staticmethod
    def forward(ctx, weight, U, V):
        return V.T @ weight @ U

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to_dense(), None, None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (1, 2)])
def test_gradcheck(make, shape, bias):
    made = make(*shape, bias=bias)

    def output(x, rotated, b):
        weight = OutOfBasis.apply(rotated, made.U, made.V)
        return FoldedFunction.apply(x, weight, b, made.U, made.V, shape[0] * shape[1])

    x, rotated = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((4, shape[1]), shape))
    b = torch.randn(shape[0], dtype=torch.float64, requires_grad=True) if bias else None
    assert torch.autograd.gradcheck(output, (x, rotated, b))


@pytest.mark.parametrize("nnz", [1, 4, 34, 35])
def test_the_largest_entries_in_the_basis_are_kept(make, nnz):
    made = make(7, 5, nnz=nnz)
    x, dy = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 7, dtype=torch.float64)
    made.layer(x).backward(dy)
    gradient = made.layer.weight.grad
    expected = (made.V @ dy.T @ x @ made.U.T).flatten()
    kept = by_sorting(expected, nnz)
    indices = gradient._indices()
    assert torch.equal(indices[0] * 5 + indices[1], kept)
    torch.testing.assert_close(gradient._values(), expected[kept], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("live", [[], [3], [0, 2, 4], [5]])
def test_rows_of_zeros_in_dy(make, live):
    made = make(nnz=9)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    dy = torch.zeros(6, 7, dtype=torch.float64)
    dy[live] = torch.randn(len(live), 7, dtype=torch.float64)
    made.layer(x).backward(dy)
    rotated = (made.V @ dy.T @ x.detach() @ made.U.T).flatten()
    expected = torch.zeros_like(rotated)
    expected[by_sorting(rotated, 9)] = rotated[by_sorting(rotated, 9)]
    assert made.layer.weight.grad._nnz() == 9
    torch.testing.assert_close(dense(made.layer.weight).flatten(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, dy @ made.linear.weight.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made.layer.bias.grad, dy.sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("without", WITHOUT)
@pytest.mark.parametrize("tokens", [1, 4, 6, 20])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_each_side_is_rotated_where_that_is_cheaper(make, shape, tokens, without):
    made = make(*shape, without=without)
    d_out, d_in = shape
    dy, x = torch.randn(tokens, d_out, dtype=torch.float64), torch.randn(tokens, d_in, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        gradient_in_basis(dy, x, made.layer.basis.U, made.layer.basis.V)
    rotations = 0 if "V" in without else d_out * d_out * min(tokens, d_in)
    rotations += 0 if "U" in without else d_in * d_in * min(tokens, d_out)
    assert counter.get_total_flops() == 2 * (tokens * d_out * d_in + rotations)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 0)])
def test_any_number_of_leading_dimensions(make, lead):
    made = make()
    x = torch.randn(*lead, 5, dtype=torch.float64, requires_grad=True)
    y = made.layer(x)
    torch.testing.assert_close(y, made.linear(x), rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert x.grad.shape == x.shape
    expected = made.V @ dy.reshape(-1, 7).T @ x.detach().reshape(-1, 5) @ made.U.T
    torch.testing.assert_close(dense(made.layer.weight), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_each_gradient_alone(make, wanted):
    made = make(nnz=8)
    values = {"x": torch.randn(6, 5, dtype=torch.float64), "weight": made.linear.weight, "bias": made.linear.bias}
    dy = torch.randn(6, 7, dtype=torch.float64)

    def gradients(names):
        leaves = {key: value.detach().clone().requires_grad_(key in names) for key, value in values.items()}
        FoldedFunction.apply(*leaves.values(), made.U, made.V, 8).backward(dy)
        assert {key for key, leaf in leaves.items() if leaf.grad is not None} == set(names)
        grad = leaves[wanted].grad
        return grad.to_dense() if grad.layout == torch.sparse_coo else grad

    assert torch.equal(gradients([wanted]), gradients(list(values)))


def test_checkpointing_gives_the_same_gradients(make):
    made = make(nnz=8)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    made.layer(x).square().sum().backward()
    expected = dense(made.layer.weight)
    made.layer.weight.grad = None
    checkpoint(made.layer, other, use_reentrant=False).square().sum().backward()
    assert torch.equal(other.grad, x.grad)
    assert torch.equal(dense(made.layer.weight), expected)


def test_what_is_saved_is_the_input_and_what_the_layer_holds(make):
    made = make()
    x = torch.randn(6, 5, dtype=torch.float64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
        made.layer(x)
    held = [x, made.layer.weight, made.layer.basis.U, made.layer.basis.V]
    assert {tensor.data_ptr() for tensor in saved} <= {tensor.data_ptr() for tensor in held}


# The largest entries


@pytest.mark.parametrize("shape", [(60, 61), (122, 61), (59, 64), (1, 5003), (5003, 1), (100, 97)])
@pytest.mark.parametrize("density", [0.0001, 0.01, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("spread", ["even", "corner", "rows", "column", "ties", "zeros", "few"])
def test_largest(shape, density, spread):
    matrix = torch.randn(shape, dtype=torch.float64)
    if spread == "corner":
        matrix *= torch.exp(-10 * torch.arange(shape[0]) / shape[0])[:, None]
        matrix *= torch.exp(-10 * torch.arange(shape[1]) / shape[1])
    elif spread == "rows":
        matrix[::3] *= 1e3
    elif spread == "column":
        matrix[:, 0] *= 1e3
    elif spread == "ties":
        matrix = matrix.sign()
    elif spread == "zeros":
        matrix.zero_()
    elif spread == "few":
        matrix[matrix.abs() < 2.5] = 0
    count = max(1, round(density * matrix.numel()))
    found = largest(matrix, count)
    assert found.dtype == torch.int64
    assert found.shape == (count,)
    assert bool((found.diff() > 0).all())  # rising, so distinct
    magnitudes = matrix.abs().flatten()
    expected = magnitudes.sort(descending=True).values[:count]
    assert torch.equal(magnitudes[found].sort(descending=True).values, expected)


def test_largest_of_nan():
    matrix = torch.randn(90, 100)
    matrix[17, 3] = matrix[80, 99] = math.nan
    found = largest(matrix, 30)
    assert {17 * 100 + 3, 80 * 100 + 99} <= set(found.tolist())


@pytest.mark.parametrize("count", [1, 90, 4000])
def test_largest_of_a_fake_matrix(count):
    with FakeTensorMode():
        assert largest(torch.empty(90, 100), count).shape == (count,)


# The optimizer's step


@pytest.mark.parametrize("without", WITHOUT)
@pytest.mark.parametrize("shape", [*SHAPES, (6, 6)])
def test_add_from_basis(make, shape, without):
    made = make(*shape, without=without)
    change = torch.zeros(shape[0] * shape[1], dtype=torch.float64)
    flat = torch.arange(0, change.numel(), 2)
    change[flat] = torch.randn(len(flat), dtype=torch.float64)
    weight = torch.randn(shape, dtype=torch.float64)
    expected = weight + made.V.T @ change.view(shape) @ made.U
    indices = torch.stack((flat // shape[1], flat % shape[1]))
    add_from_basis(weight, indices, change[flat], made.layer.basis)
    torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("capacity", [None, 2])
@pytest.mark.parametrize("without", WITHOUT)
@pytest.mark.parametrize(("shape", "nnz"), [((7, 5), 6), ((5, 11), 9), ((13, 4), 1), ((1, 3), 2), ((3, 1), 3)])
def test_steps_are_those_of_the_published_form(make, distance, shape, nnz, without, capacity):
    folded = make(*shape, without=without, nnz=nnz).layer
    published = SparseGradLinear.in_basis(copy.deepcopy(folded.to_linear()), folded.basis, nnz=nnz)
    published.bias = nn.Parameter(folded.bias.detach().clone())
    layers = folded, published
    start = folded.weight.detach().clone()
    optimizers = [SparseAdam([layer.weight], lr=0.1, capacity=capacity) for layer in layers]
    for _ in range(8):
        x = torch.randn(9, shape[1], dtype=torch.float64)
        target = torch.randn(9, shape[0], dtype=torch.float64)
        outputs = [layer(x) for layer in layers]
        assert distance(*outputs) < 1e-10
        for layer, output, optimizer in zip(layers, outputs, optimizers, strict=True):
            layer.zero_grad(set_to_none=True)
            (output - target).square().sum().backward()
            optimizer.step()
        indices = [layer.weight.grad.coalesce().indices() for layer in layers]
        assert torch.equal(*indices)
        assert distance(*(layer.to_linear().weight for layer in layers)) < 1e-10
    assert float((folded.weight.detach() - start).norm()) > 0.05


def test_an_update_in_bfloat16_is_lost_where_it_is_below_the_weights_rounding(make):
    made = make(64, 48, dtype=torch.bfloat16, nnz=30)
    before = made.layer.weight.detach().clone()
    x, dy = torch.randn(9, 48).bfloat16(), torch.randn(9, 64).bfloat16()
    made.layer(x).backward(dy)
    for lr, moves in ((1e-7, False), (1e-1, True)):
        SparseAdam([made.layer.weight], lr=lr).step()
        assert torch.equal(made.layer.weight, before) is not moves


def pass_and_step(layer, optimizer, x):
    layer.zero_grad(set_to_none=True)
    layer(x).square().sum().backward()
    optimizer.step()
    return layer.weight.detach().clone()


@pytest.mark.parametrize("how", ["deepcopy", "load_state_dict"])
def test_a_copy_goes_on_in_its_own_basis(make, how):
    layer = make(nnz=6).layer
    optimizer = SparseAdam([layer.weight], lr=0.1)
    x = torch.randn(9, 5, dtype=torch.float64)
    pass_and_step(layer, optimizer, x)
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    else:
        other = make(nnz=6).layer
        other.load_state_dict(layer.state_dict())
    its_optimizer = SparseAdam([other.weight], lr=0.1)
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(pass_and_step(other, its_optimizer, x), pass_and_step(layer, optimizer, x))
    assert other.weight.gradient_basis is other.basis


# Conversion and merging


@pytest.mark.parametrize("shape", SHAPES)
def test_conv1d_goes_in_and_comes_out(make, distance, shape):
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    source, made = Conv1D(*shape), make(*shape)
    source.double()
    nn.init.normal_(source.weight)
    kept = source.weight.detach().clone()
    layer = FoldedLinear(source, made.layer.basis, density=1.0)
    x = torch.randn(6, shape[1], dtype=torch.float64)
    assert distance(layer(x), source(x)) < 1e-12
    pass_and_step(layer, SparseAdam([layer.weight], lr=0.1), x)
    merged = layer.to_linear()
    assert type(merged) is Conv1D
    assert merged.weight.shape == source.weight.shape
    assert distance(merged(x), layer(x)) < 1e-12
    assert not torch.equal(merged.weight, kept)


@pytest.mark.parametrize("bias", [True, False])
def test_merging_gives_the_weight_itself(make, bias):
    layer = make(bias=bias, nnz=6).layer
    pass_and_step(layer, SparseAdam([layer.weight], lr=0.1), torch.randn(9, 5, dtype=torch.float64))
    merged = merge(layer)
    assert type(merged) is nn.Linear
    assert torch.equal(merged.weight, layer.weight)
    assert merged.bias is layer.bias


@pytest.mark.parametrize(
    ("source", "U", "V", "budget", "message"),
    [
        (nn.Identity(), 5, 7, {"nnz": 3}, "only a plain linear layer"),
        (nn.Linear(5, 7), 4, 7, {"nnz": 3}, "U"),
        (nn.Linear(5, 7), 5, 6, {"nnz": 3}, "V"),
        (nn.Linear(5, 7), 5, 7, {"nnz": 36}, "from 1 to 35"),
        (nn.Linear(5, 7), 5, 7, {"density": 0.0}, "density"),
        (nn.Linear(5, 7), 5, 7, {}, "exactly one of"),
    ],
)
def test_what_does_not_fit_is_refused(source, U, V, budget, message):
    with pytest.raises(SparseGradError, match=message):
        FoldedLinear(source, TransitionMatrices(torch.eye(U), torch.eye(V)), **budget)


def test_leading_directions_alone_are_refused():
    with pytest.raises(SparseGradError):
        FoldedLinear(nn.Linear(5, 7), TransitionMatrices(torch.eye(5)[:3], torch.eye(7)), nnz=3)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_model_is_converted_trained_and_merged(tiny, distance, family):
    model, batch = tiny(family)
    model.double()
    layers = find_layers(model)
    bases = calibrate(model, layers, [batch])
    before = model(**batch).logits.detach()
    convert_folded(model, layers, bases, density=0.1)
    assert distance(model(**batch).logits, before) < 1e-12
    weights = [layer.weight for _, layer in adapted_layers(model)]
    assert len(weights) == sum(len(names) for names in layers.values())
    model(**batch).loss.backward()
    SparseAdam(weights, lr=1e-2).step()
    trained = model(**batch).logits.detach()
    assert distance(trained, before) > 1e-4
    merge(model)
    assert not any(adapted_layers(model))
    assert distance(model(**batch).logits, trained) < 1e-12


@pytest.mark.parametrize("budget", [{"nnz": 0}, {"density": 2.0}, {}, {"nnz": 10**6}])
def test_conversions_that_do_not_fit_change_nothing(tiny, unchanged, budget):
    model, batch = tiny("bert")
    layers = find_layers(model)
    bases = calibrate(model, layers, [batch])
    with unchanged(model), pytest.raises(SparseGradError):
        convert_folded(model, layers, bases, **budget)
