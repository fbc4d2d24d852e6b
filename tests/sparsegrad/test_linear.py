"""SparseGradLinear against the linear layer it stands for and the closed forms of the paper's Table 2.

Expected values: `Y = X W^T + b`, `dL/dX = dL/dY W`, `dL/db = sum_t dL/dY`, `dL/dW~ = V G U^T` with
`G = (dL/dY)^T X`, all in float64 on the unconverted layer's own weight.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sparsegrad import SparseAdam, SparseGradError, SparseGradLinear, TransitionMatrices, merge
from sparsegrad.linear import into_basis

# (D_out, D_in): prime, wide and tall, a single row or column.
SHAPES = [(7, 5), (5, 11), (1, 3), (3, 1)]
PRODUCTS = ["sparse-by-dense", "dense"]
# Relative to the largest magnitude; the layer makes three products where the linear one makes one.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture
def make(orthogonal):
    """A linear layer, the SparseGrad layer converted from it, and the bases in float64."""

    def build(d_out=7, d_in=5, *, bias=True, dtype=torch.float64, **budget):
        linear = nn.Linear(d_in, d_out, bias=bias, dtype=dtype)
        U, V = orthogonal(d_in, dtype), orthogonal(d_out, dtype)
        if not {"nnz", "density"} & budget.keys():
            budget["nnz"] = d_out * d_in
        layer = SparseGradLinear.from_linear(copy.deepcopy(linear), U, V, **budget)
        return SimpleNamespace(linear=linear, layer=layer, U=U.double(), V=V.double())

    return build


def closed_form(made, x, dy) -> SimpleNamespace:
    """What a pass over X (T, D_in) and dL/dY (T, D_out) must give."""
    x, dy, weight = x.detach().double(), dy.double(), made.linear.weight.detach().double()
    y = x @ weight.T
    if made.linear.bias is not None:
        y = y + made.linear.bias.detach().double()
    return SimpleNamespace(y=y, dx=dy @ weight, dbias=dy.sum(0), dweight=made.V @ (dy.T @ x) @ made.U.T)


def entries(sparse: torch.Tensor) -> dict[tuple[int, int], float]:
    """(row, col) -> value of what is stored; a place that is stored twice is an error."""
    places = [tuple(place) for place in sparse._indices().T.tolist()]
    assert len(set(places)) == len(places)
    return dict(zip(places, sparse._values().tolist(), strict=True))


def largest(dense: torch.Tensor, nnz: int) -> set[tuple[int, int]]:
    """The places of largest magnitude, by sorting all of them."""
    order = dense.abs().flatten().sort(descending=True, stable=True).indices[:nnz].tolist()
    return {divmod(place, dense.shape[1]) for place in order}


# Values and dense gradients


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_are_the_closed_forms(make, distance, shape, tokens, bias, dtype, product):
    made = make(*shape, bias=bias, dtype=dtype, product=product)
    x = torch.randn(tokens, shape[1], dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, shape[0], dtype=dtype)
    expected = closed_form(made, x, dy)
    y = made.layer(x)
    y.backward(dy)
    assert y.dtype == x.grad.dtype == made.layer.weight.grad.dtype == dtype
    assert made.layer.weight.grad.layout == torch.sparse_coo
    assert distance(y, expected.y) < ROUNDING[dtype]
    assert distance(x.grad, expected.dx) < ROUNDING[dtype]
    assert distance(made.layer.weight.grad.to_dense(), expected.dweight) < ROUNDING[dtype]
    if bias:
        assert distance(made.layer.bias.grad, expected.dbias) < ROUNDING[dtype]


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("without", ["U", "V", "UV"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_side_without_a_matrix_is_not_rotated(make, orthogonal, distance, shape, without, bias, product):
    made = make(*shape, bias=bias)
    if "U" in without:
        made.U = torch.eye(shape[1], dtype=torch.float64)
    if "V" in without:
        made.V = torch.eye(shape[0], dtype=torch.float64)
    U, V = (None if name in without else getattr(made, name) for name in "UV")
    linear = copy.deepcopy(made.linear)
    layer = SparseGradLinear.from_linear(linear, U, V, nnz=shape[0] * shape[1], product=product)
    assert layer.weight.data_ptr() != linear.weight.data_ptr()
    x = torch.randn(6, shape[1], dtype=torch.float64, requires_grad=True)
    dy = torch.randn(6, shape[0], dtype=torch.float64)
    expected = closed_form(made, x, dy)
    y = layer(x)
    y.backward(dy)
    assert distance(y, expected.y) < 1e-12
    assert distance(x.grad, expected.dx) < 1e-12
    assert distance(layer.weight.grad.to_dense(), expected.dweight) < 1e-12
    assert distance(layer.to_linear().weight, made.linear.weight) < 1e-12


def test_the_weight_lives_in_the_basis(make, distance):
    made = make(7, 5)
    assert distance(made.layer.weight, made.V @ made.linear.weight @ made.U.T) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotating_in_and_out_rounds_once(make, dtype):
    made = make(61, 48, dtype=dtype)
    expected = made.V @ made.linear.weight.double() @ made.U.T
    half_a_unit = torch.finfo(dtype).eps / 2 * (1 + 1e-6)
    torch.testing.assert_close(made.layer.weight.double(), expected, rtol=half_a_unit, atol=0)
    expected = made.V.T @ made.layer.weight.double() @ made.U
    torch.testing.assert_close(made.layer.to_linear().weight.double(), expected, rtol=half_a_unit, atol=0)


@pytest.mark.parametrize("side", ["U", "V"])
def test_what_is_rotated_is_not_copied_as_a_whole(side, orthogonal, allocations):
    weight, matrix = torch.randn(400, 80) if side == "U" else torch.randn(80, 400), orthogonal(80, torch.float32)
    basis = TransitionMatrices(matrix, None) if side == "U" else TransitionMatrices(None, matrix)
    with allocations() as made:
        rotated = into_basis(weight, basis)
    exact = weight.double() @ matrix.T.double() if side == "U" else matrix.double() @ weight.double()
    assert torch.equal(rotated, exact.float())
    # The result in float32; in float64 an eighth of the weight.
    assert sorted(set(made.sizes))[-2:] == [8 * 400 * 80 // 8, 4 * 400 * 80]


class DenseGradient(torch.autograd.Function):
    """The identity, whose gradient is dense: gradcheck wants a dense input's gradient to be so."""

    @staticmethod
    def forward(ctx, weight):
        return weight.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to_dense()


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (1, 2)])
def test_gradcheck(make, shape, bias, product):
    made = make(*shape, bias=bias, product=product)
    x = torch.randn(4, shape[1], dtype=torch.float64, requires_grad=True)

    def function(x, weight, *rest):
        parameters = {"weight": DenseGradient.apply(weight), **dict(zip(["bias"], rest, strict=False))}
        return torch.func.functional_call(made.layer, parameters, (x,))

    parameters = [p.detach().clone().requires_grad_() for p in made.layer.parameters()]
    assert len(parameters) == 1 + bias
    assert torch.autograd.gradcheck(function, (x, *parameters))


# The kept entries


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("nnz", [1, 4, 17, 35])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (35, 1), (1, 35)])
def test_kept_entries_are_the_largest_of_the_gradient_in_the_basis(make, shape, nnz, product):
    made = make(*shape, nnz=nnz, product=product)
    x, dy = torch.randn(6, shape[1], dtype=torch.float64), torch.randn(6, shape[0], dtype=torch.float64)
    expected = closed_form(made, x, dy)
    made.layer(x).backward(dy)
    kept = entries(made.layer.weight.grad)
    assert kept.keys() == largest(expected.dweight, nnz)
    for (row, col), value in kept.items():
        assert value == pytest.approx(expected.dweight[row, col].item(), rel=1e-10)
    # The bias is trained densely, whatever is kept of the weight.
    torch.testing.assert_close(made.layer.bias.grad, expected.dbias, rtol=1e-12, atol=1e-12)


def test_density_is_the_share_of_kept_entries(make):
    made = make(7, 5, density=0.2)
    made.layer(torch.randn(6, 5, dtype=torch.float64)).square().sum().backward()
    assert made.layer.nnz == made.layer.weight.grad._nnz() == 7  # 0.2 * 35


@pytest.mark.parametrize("nnz", [1, 3, 35])
def test_the_input_gradient_does_not_depend_on_what_is_kept(make, distance, nnz):
    made = make(7, 5, nnz=nnz)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(6, 7, dtype=torch.float64)
    made.layer(x).backward(dy)
    assert distance(x.grad, closed_form(made, x, dy).dx) < 1e-12


def test_the_support_moves_with_the_gradient(make):
    made = make(7, 5, nnz=3)
    supports = set()
    for _ in range(4):
        made.layer.zero_grad()
        x, dy = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 7, dtype=torch.float64)
        made.layer(x).backward(dy)
        supports.add(frozenset(entries(made.layer.weight.grad)))
        assert supports >= {frozenset(largest(closed_form(made, x, dy).dweight, 3))}
    assert len(supports) > 1


# Zeros in dL/dY, and in dL/dY~


def with_zeros(dy: torch.Tensor, pattern: str) -> torch.Tensor:
    keep = torch.zeros_like(dy)
    tokens, outputs = {
        "zero rows": (slice(0, None, 2), slice(None)),
        "all zero": (slice(0, 0), slice(None)),
        "one token": (slice(3, 4), slice(None)),
        "zero columns": (slice(None), slice(0, None, 3)),
        "one entry": (slice(3, 4), slice(2, 3)),
    }[pattern]
    keep[tokens, outputs] = 1
    return dy * keep


@pytest.mark.parametrize("nnz", [1, 8, 35])
@pytest.mark.parametrize("basis", ["random", "identity"])
@pytest.mark.parametrize("pattern", ["zero rows", "all zero", "one token", "zero columns", "one entry"])
def test_both_products_are_right_where_dy_has_zeros(orthogonal, pattern, basis, nnz):
    linear = nn.Linear(5, 7, dtype=torch.float64)
    # V = I leaves zero columns of dL/dY zero in dL/dY~: then fewer than nnz entries of the gradient can be non-zero.
    U, V = orthogonal(5), orthogonal(7)
    if basis == "identity":
        U, V = torch.eye(5, dtype=torch.float64), torch.eye(7, dtype=torch.float64)
    made = SimpleNamespace(linear=linear, U=U, V=V)
    x = torch.randn(6, 5, dtype=torch.float64)
    dy = with_zeros(torch.randn(6, 7, dtype=torch.float64), pattern)
    expected = closed_form(made, x, dy)
    magnitudes = expected.dweight.abs().flatten().sort(descending=True).values
    for product in PRODUCTS:
        layer = SparseGradLinear.from_linear(copy.deepcopy(linear), U, V, nnz=nnz, product=product)
        leaf = x.clone().requires_grad_()
        layer(leaf).backward(dy)
        torch.testing.assert_close(leaf.grad, expected.dx, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.bias.grad, expected.dbias, rtol=1e-12, atol=1e-12)
        kept = entries(layer.weight.grad)
        assert len(kept) == nnz
        # The values are the gradient's, and no larger one was left out.
        values = torch.tensor([expected.dweight[place] for place in kept], dtype=torch.float64)
        torch.testing.assert_close(
            torch.tensor(list(kept.values()), dtype=torch.float64), values, rtol=1e-10, atol=1e-12
        )
        torch.testing.assert_close(values.abs().sort(descending=True).values, magnitudes[:nnz], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("product", "paid"), [("sparse-by-dense", 2), ("dense", 6)])
def test_the_product_decides_which_tokens_backward_pays_for(make, product, paid):
    tokens, d_out, d_in = 6, 7, 5
    made = make(d_out, d_in, product=product)
    x = torch.randn(tokens, d_in, dtype=torch.float64, requires_grad=True)
    dy = torch.zeros(tokens, d_out, dtype=torch.float64)
    dy[[1, 4]] = torch.randn(2, d_out, dtype=torch.float64)
    y = made.layer(x)
    with FlopCounterMode(display=False) as counter:
        y.backward(dy)
    # dL/dY V^T, dL/dW~, dL/dY~ W~ and its product with U.
    assert counter.get_total_flops() == 2 * paid * (d_out * d_out + 2 * d_out * d_in + d_in * d_in)


# Shapes of the input


@pytest.mark.parametrize("lead", [(), (1,), (6,), (1, 1), (2, 3), (2, 1, 3, 2)])
def test_any_number_of_leading_dimensions(make, distance, lead):
    made = make(7, 5)
    x = torch.randn(*lead, 5, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(*lead, 7, dtype=torch.float64)
    expected = closed_form(made, x.reshape(-1, 5), dy.reshape(-1, 7))
    y = made.layer(x)
    assert y.shape == (*lead, 7)
    y.backward(dy)
    assert distance(y.reshape(-1, 7), expected.y) < 1e-12
    assert distance(x.grad.reshape(-1, 5), expected.dx) < 1e-12
    assert distance(made.layer.weight.grad.to_dense(), expected.dweight) < 1e-12
    assert distance(made.layer.bias.grad, expected.dbias) < 1e-12


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_inputs_and_upstream_gradients_that_are_not_contiguous(make, distance, layout):
    def strange(width):
        return {
            "transposed": lambda: torch.randn(width, 3, 2, dtype=torch.float64).permute(2, 1, 0),
            "strided": lambda: torch.randn(4, 6, 2 * width, dtype=torch.float64)[::2, ::2, ::2],
            "expanded": lambda: torch.randn(1, 1, width, dtype=torch.float64).expand(2, 3, width),
        }[layout]()

    made = make(7, 5)
    x, dy = strange(5), strange(7)
    assert not x.is_contiguous()
    assert not dy.is_contiguous()
    x.requires_grad_()
    expected = closed_form(made, x.reshape(-1, 5), dy.reshape(-1, 7))
    (dx,) = torch.autograd.grad(made.layer(x), x, dy, retain_graph=True)
    made.layer(x).backward(dy)
    assert distance(dx.reshape(-1, 5), expected.dx) < 1e-12
    assert distance(made.layer.weight.grad.to_dense(), expected.dweight) < 1e-12


def test_a_sum_as_the_loss(make, distance):
    """dL/dY of `y.sum()` has stride zero."""
    made = make(7, 5)
    x = torch.randn(6, 5, dtype=torch.float64)
    made.layer(x).sum().backward()
    assert distance(made.layer.weight.grad.to_dense(), closed_form(made, x, torch.ones(6, 7)).dweight) < 1e-12


@pytest.mark.parametrize("product", PRODUCTS)
def test_no_token_at_all(make, product):
    made = make(7, 5, nnz=4, product=product)
    x = torch.randn(2, 0, 5, dtype=torch.float64, requires_grad=True)
    y = made.layer(x)
    assert y.shape == (2, 0, 7)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(made.layer.weight.grad.to_dense(), torch.zeros(7, 5, dtype=torch.float64))
    assert torch.equal(made.layer.bias.grad, torch.zeros(7, dtype=torch.float64))


# Autograd


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_each_gradient_alone(make, distance, wanted):
    made = make(7, 5)
    x = torch.randn(6, 5, dtype=torch.float64)
    dy = torch.randn(6, 7, dtype=torch.float64)
    tensors = {"x": x, "weight": made.layer.weight, "bias": made.layer.bias}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    made.layer(x).backward(dy)
    expected = closed_form(made, x, dy)
    value = {"x": expected.dx, "weight": expected.dweight, "bias": expected.dbias}[wanted]
    assert distance(tensors[wanted].grad.to_dense(), value) < 1e-12
    assert all(tensor.grad is None for name, tensor in tensors.items() if name != wanted)


def test_gradients_of_two_passes_add_up(make, distance):
    made = make(7, 5, nnz=9)
    total = torch.zeros(7, 5, dtype=torch.float64)
    for _ in range(2):
        x, dy = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 7, dtype=torch.float64)
        made.layer(x).backward(dy)
        gradient = closed_form(made, x, dy).dweight
        for row, col in largest(gradient, 9):
            total[row, col] += gradient[row, col]
    assert distance(made.layer.weight.grad.to_dense(), total) < 1e-12


def test_a_layer_used_twice_in_one_pass(make, distance):
    made = make(5, 5)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    twin_x = x.detach().clone().requires_grad_()
    made.layer(torch.tanh(made.layer(x))).square().sum().backward()
    made.linear(torch.tanh(made.linear(twin_x))).square().sum().backward()
    assert distance(x.grad, twin_x.grad) < 1e-12
    expected = made.V @ made.linear.weight.grad @ made.U.T
    assert distance(made.layer.weight.grad.to_dense(), expected) < 1e-12


def test_checkpointing_gives_the_same_gradients(make):
    made = make(7, 5, nnz=6)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for run in (made.layer, lambda x: checkpoint(made.layer, x, use_reentrant=False)):
        made.layer.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        found.append((made.layer.weight.grad.to_dense(), made.layer.bias.grad, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_saved_for_backward(make):
    """X~ (T, D_in) stands in for X; what else is saved exists anyway."""
    made = make(7, 5)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        made.layer(x)
    kept = {made.layer.weight.data_ptr(), made.layer.basis.U.data_ptr(), made.layer.basis.V.data_ptr()}
    extra = [t for t in saved if t.data_ptr() not in kept]
    assert [t.shape for t in extra] == [(6, 5)]
    assert extra[0].data_ptr() != x.data_ptr()


# Narrow types


def test_bfloat16_trains_within_its_rounding(make):
    made = make(61, 48, dtype=torch.bfloat16, nnz=30)
    x = torch.randn(6, 48, dtype=torch.bfloat16, requires_grad=True)
    optimizer = SparseAdam([made.layer.weight], lr=1e-2)
    before = made.layer.weight.detach().clone()
    y = made.layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected = closed_form(made, x, dy)
    # Error of a sum of rounded terms, by its norm: bf16 rounds to 2^-8 and three roundings of each of Y's factors
    # (W~, X~, Y~, U, V) stay below ten of them.
    for actual, value in ((y, expected.y), (x.grad, expected.dx)):
        assert (actual.double() - value).norm() < 10 * 2**-8 * value.norm()
    optimizer.step()
    assert made.layer.weight.isfinite().all()
    moved = (made.layer.weight != before).nonzero().tolist()
    assert 0 < len(moved) <= 30
    assert {tuple(place) for place in moved} <= entries(made.layer.weight.grad).keys()


def test_autocast_trains_as_a_linear_layer_does(make):
    made = make(7, 5, dtype=torch.float32, nnz=35)
    x = torch.randn(6, 5, requires_grad=True)
    dy = torch.randn(6, 7).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made.layer(x)
    y.backward(dy)
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == made.layer.weight.grad.dtype == made.layer.bias.grad.dtype == torch.float32
    expected = closed_form(made, x, dy)
    for actual, value in ((y, expected.y), (x.grad, expected.dx), (made.layer.bias.grad, expected.dbias)):
        assert (actual.double() - value).norm() < 10 * 2**-8 * value.norm()
    gradient = made.layer.weight.grad.to_dense().double()
    assert (gradient - expected.dweight).norm() < 10 * 2**-8 * expected.dweight.norm()


# Back to a linear layer


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_merging_after_training_changes_no_output(make, distance, shape, bias, dtype):
    made = make(*shape, bias=bias, dtype=dtype, nnz=2)
    optimizers = [SparseAdam([made.layer.weight], lr=0.1)]
    if bias:
        optimizers.append(torch.optim.AdamW([made.layer.bias], lr=0.1))
    for _ in range(5):
        made.layer.zero_grad()
        made.layer(torch.randn(6, shape[1], dtype=dtype)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    x = torch.randn(6, shape[1], dtype=dtype)
    trained = made.layer(x)
    assert distance(trained, made.linear(x)) > 1e-2
    merged = made.layer.eval().to_linear()
    assert type(merged) is nn.Linear
    assert (merged.out_features, merged.in_features) == shape
    assert not merged.training
    assert merged.bias is made.layer.bias
    assert merged.weight.dtype == dtype
    assert merged.weight.requires_grad
    assert distance(merged(x), trained) < ROUNDING[dtype]
    expected = made.V.T @ made.layer.weight.double() @ made.U
    assert distance(merged.weight, expected) < ROUNDING[dtype]


def test_merging_an_untrained_layer_gives_the_source_back(make, distance):
    made = make(7, 5)
    assert distance(made.layer.to_linear().weight, made.linear.weight) < 1e-12


def test_merging_a_lone_layer(make, distance):
    made = make(7, 5)
    merged = merge(made.layer)
    assert type(merged) is nn.Linear
    assert distance(merged.weight, made.linear.weight) < 1e-12
    assert merged.bias is made.layer.bias


@pytest.mark.parametrize("shape", SHAPES)
def test_conv1d_goes_in_and_comes_out(orthogonal, distance, shape):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    d_out, d_in = shape
    source = conv1d(d_out, d_in).double()
    nn.init.normal_(source.weight)
    nn.init.normal_(source.bias)
    layer = SparseGradLinear.from_linear(source, orthogonal(d_in), orthogonal(d_out), nnz=d_out * d_in)
    assert layer.weight.shape == shape
    x = torch.randn(2, 3, d_in, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert distance(y, source(x)) < 1e-12
    y.square().sum().backward()
    with torch.no_grad():
        layer.weight.add_(layer.weight.grad, alpha=-0.1)
    merged = layer.to_linear()
    assert type(merged) is conv1d
    assert merged.weight.shape == (d_in, d_out)
    assert merged.weight.is_contiguous()
    assert (merged.nx, merged.nf) == (d_in, d_out)
    assert merged.bias is source.bias
    assert distance(merged(x), layer(x)) < 1e-12


# Construction


def test_the_source_keeps_its_weight_and_shares_its_bias(orthogonal):
    linear = nn.Linear(5, 7)
    before = linear.weight.detach().clone()
    layer = SparseGradLinear.from_linear(linear, orthogonal(5, torch.float32), orthogonal(7, torch.float32), nnz=3)
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(linear.weight, before)
    assert layer.bias is linear.bias


def test_what_trains_is_the_weight_and_the_bias(make):
    made = make(7, 5)
    assert {name for name, _ in made.layer.named_parameters()} == {"weight", "bias"}
    assert {name for name, _ in made.layer.named_buffers()} == {"basis.U", "basis.V"}


@pytest.mark.parametrize(
    ("U", "V", "message"),
    [
        ((7, 7), (5, 5), "7 x 5 .* needs U with 5 columns, got 7 x 7"),  # swapped
        ((4, 4), (7, 7), "needs U with 5 columns, got 4 x 4"),
        ((5, 5), (8, 8), "needs V with 7 columns, got 8 x 8"),
        ((4, 5), (7, 7), "U must be square here, got 4 x 5"),
        ((5, 5), (3, 7), "V must be square here, got 3 x 7"),
        ((5, 4), (7, 7), r"U must be a matrix .* got shape \(5, 4\)"),
        ((5, 5), (7,), r"V must be a matrix .* got shape \(7,\)"),
    ],
)
def test_bases_of_the_wrong_shape_are_refused(U, V, message):
    with pytest.raises(SparseGradError, match=message):
        SparseGradLinear.from_linear(nn.Linear(5, 7), torch.ones(U), torch.ones(V), nnz=3)


def test_bases_of_another_dtype_are_refused():
    with pytest.raises(SparseGradError, match=r"U is torch.float64 .* the weight torch.float32"):
        SparseGradLinear.from_linear(nn.Linear(5, 7), torch.eye(5).double(), torch.eye(7), nnz=3)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "exactly one of nnz and density"),
        ({"nnz": 3, "density": 0.1}, "exactly one of nnz and density"),
        ({"nnz": 0}, "from 1 to 35"),
        ({"nnz": 36}, "from 1 to 35"),
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"density": 1.5}, r"density must be in \(0, 1\], got 1.5"),
        ({"nnz": 3, "product": "sparse"}, "product must be one of sparse-by-dense, dense, got 'sparse'"),
    ],
)
def test_budgets_and_products_that_do_not_fit_are_refused(budget, message):
    with pytest.raises(SparseGradError, match=message):
        SparseGradLinear.from_linear(nn.Linear(5, 7), torch.eye(5), torch.eye(7), **budget)


class Scaled(nn.Linear):
    """Computes something else than its weight says."""


@pytest.mark.parametrize("source", [nn.LayerNorm(5), nn.Bilinear(5, 5, 5), Scaled(5, 5)])
def test_only_plain_linear_layers_are_converted(source):
    with pytest.raises(SparseGradError, match=f"only a plain linear layer .* got a {type(source).__name__}"):
        SparseGradLinear.from_linear(source, torch.eye(5), torch.eye(5), nnz=3)


def test_a_converted_layer_is_not_converted_again(make):
    made = make(5, 5)
    with pytest.raises(SparseGradError, match="got a SparseGradLinear"):
        SparseGradLinear.in_basis(made.layer, TransitionMatrices(made.U, made.V), nnz=3)


# The weight gradient in row blocks


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("blocks", [2, 8, 50])
@pytest.mark.parametrize("sides", ["both", "U", "V"])
def test_blocks_keep_the_entries_of_the_whole_gradient(make, sides, blocks, product):
    made = make(11, 7)
    U, V = made.U if sides != "V" else None, made.V if sides != "U" else None
    x, dy = torch.randn(9, 7, dtype=torch.float64), torch.randn(9, 11, dtype=torch.float64)
    dy[[1, 2, 6]] = 0  # tokens that do not count
    if V is None:
        dy[:, [0, 4]] = 0  # outputs that nothing reaches
    found = []
    for count in (1, blocks):
        layer = SparseGradLinear.from_linear(made.linear, U, V, nnz=20, product=product, blocks=count)
        leaf = x.clone().requires_grad_()
        layer(leaf).backward(dy)
        found.append((entries(layer.weight.grad), leaf.grad, layer.bias.grad.clone()))
        layer.bias.grad = None
    (whole, dx, dbias), (kept, blocks_dx, blocks_dbias) = found
    assert len(kept) == 20
    assert kept == pytest.approx(whole, rel=1e-12, abs=1e-14)
    torch.testing.assert_close(blocks_dx, dx, rtol=1e-12, atol=1e-13)
    assert torch.equal(blocks_dbias, dbias)


@pytest.mark.parametrize("live", [[3], [0, 6, 7]])
def test_blocks_take_the_rest_from_zeros(make, live):
    # One output gives 5 entries that can be non-zero, three give 15: 9 and 20 are asked for.
    made = make(8, 5)
    nnz = {1: 9, 3: 20}[len(live)]
    layer = SparseGradLinear.from_linear(made.linear, made.U, None, nnz=nnz, blocks=4)
    x, dy = torch.randn(6, 5, dtype=torch.float64), torch.zeros(6, 8, dtype=torch.float64)
    dy[:, live] = torch.randn(6, len(live), dtype=torch.float64)
    layer(x).backward(dy)
    kept = entries(layer.weight.grad)
    assert len(kept) == nnz
    gradient = dy.T @ (x @ made.U.T)
    nonzero = {tuple(place): gradient[tuple(place)].item() for place in gradient.nonzero().tolist()}
    assert len(nonzero) == 5 * len(live)
    assert {place: value for place, value in kept.items() if value} == pytest.approx(nonzero, rel=1e-12)


@pytest.mark.parametrize("blocks", [0, -3, 1.5, True])
def test_a_wrong_number_of_blocks(make, blocks):
    with pytest.raises(SparseGradError, match=f"blocks must be an integer of at least 1, got {blocks}"):
        make(blocks=blocks)
