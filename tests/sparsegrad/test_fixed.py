"""The fixed support: FixedLinear against closed forms in float64, and the choice of entries against a dense sum.

Expected values: `Y = X W^T + b`, `dL/dX = dL/dY W`, `dL/db = sum_t dL/dY`, and of `V G U^T` with `G = (dL/dY)^T X` the
chosen entries, computed from the unconverted layer's own weight.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparsegrad import (
    FixedLinear,
    Ranks,
    SparseGradError,
    TransitionMatrices,
    calibrate,
    choose_entries,
    convert_fixed,
    fixed,
    fixed_ranks,
    merge,
)
from sparsegrad.fixed import EntryStore, FixedFunction, input_gradient
from sparsegrad.products import Selection
from sparsegrad.support import position_dtype

# (D_out, D_in), and the positions as (row, col): the weight gradient is made in blocks of an eighth of the rows,
# rounded up, so 19 rows are six blocks of 3 and one of 1.
CASES = {
    "spread": ((19, 5), [divmod(i, 5) for i in range(0, 95, 3)]),
    "all": ((16, 6), [divmod(i, 6) for i in range(96)]),
    "last block alone": ((19, 5), [(18, 0), (18, 2), (18, 4)]),
    "leading columns": ((7, 11), [(0, 2), (3, 0), (3, 1), (6, 2)]),
    "fewer rows than blocks": ((3, 5), [(0, 0), (0, 3), (2, 4)]),
    "one row": ((1, 7), [(0, 1), (0, 6)]),
    "one column": ((7, 1), [(0, 0), (4, 0)]),
    "one entry": ((7, 3), [(6, 2)]),
}
SIDES = ["", "U", "V", "UV"]
LEADING = {"leading columns": 3}  # directions that U has, where not all
EXACT = {"rtol": 1e-11, "atol": 1e-12}


@pytest.fixture
def make(orthogonal):
    """The plain layer, the layer with a fixed support, its bases (identities where a side is not rotated)."""

    def build(case="spread", sides="UV", *, bias=True, dtype=torch.float64, values_dtype=None):
        (d_out, d_in), places = CASES[case]
        linear = nn.Linear(d_in, d_out, bias=bias, dtype=dtype)
        U = orthogonal(d_in, dtype)[: LEADING.get(case, d_in)] if "U" in sides else None
        V = orthogonal(d_out, dtype) if "V" in sides else None
        width = d_in if U is None else U.shape[0]
        index = torch.tensor([row * width + col for row, col in places], dtype=torch.int32)
        layer = FixedLinear.in_basis(copy.deepcopy(linear), TransitionMatrices(U, V), index, values_dtype)
        U, V = (torch.eye(n) if m is None else m for n, m in ((d_in, U), (d_out, V)))
        places = tuple(torch.tensor(places).T)
        return SimpleNamespace(linear=linear, layer=layer, sides=sides, U=U.double(), V=V.double(), places=places)

    return build


def closed_form(made, x, dy, weight=None):
    x, dy = x.detach().double(), dy.double()
    weight = made.linear.weight.detach().double() if weight is None else weight
    y = x @ weight.T
    if made.linear.bias is not None:
        y = y + made.linear.bias.detach().double()
    gradient = made.V @ (dy.T @ x) @ made.U.T
    return SimpleNamespace(y=y, dx=dy @ weight, dbias=dy.sum(0), dvalues=gradient[made.places])


def inputs(made, tokens, dtype=torch.float64):
    x = torch.randn(tokens, made.linear.in_features, dtype=dtype, requires_grad=True)
    return x, torch.randn(tokens, made.linear.out_features, dtype=dtype)


# The layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 11])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_are_the_closed_forms(make, case, sides, tokens, bias):
    made = make(case, sides, bias=bias)
    x, dy = inputs(made, tokens)
    expected = closed_form(made, x, dy)
    y = made.layer(x)
    y.backward(dy)
    torch.testing.assert_close(y.detach(), expected.y, **EXACT)
    torch.testing.assert_close(x.grad, expected.dx, **EXACT)
    torch.testing.assert_close(made.layer.values.grad, expected.dvalues, **EXACT)
    if bias:
        torch.testing.assert_close(made.layer.bias.grad, expected.dbias, **EXACT)
    assert made.layer.weight.grad is None


@pytest.mark.parametrize("live", [[], [4], [0, 3, 10]])
@pytest.mark.parametrize("sides", SIDES)
def test_tokens_without_a_gradient_take_no_part(make, sides, live):
    made = make("leading columns", sides)
    x, dense = inputs(made, 11)
    dy = torch.zeros_like(dense)
    dy[live] = dense[live]
    expected = closed_form(made, x, dy)
    dead = torch.ones(11, dtype=torch.bool)
    dead[live] = False
    with torch.no_grad():
        # 0 * NaN is NaN: a token that took part would show.
        x[dead] = float("nan")
    made.layer(x).backward(dy)
    torch.testing.assert_close(x.grad, expected.dx, **EXACT)
    torch.testing.assert_close(made.layer.values.grad, expected.dvalues, **EXACT)
    torch.testing.assert_close(made.layer.bias.grad, expected.dbias, **EXACT)


@pytest.mark.parametrize("sides", SIDES)
def test_gradcheck(orthogonal, sides):
    d_out, d_in = 5, 4
    U = orthogonal(d_in)[:2] if "U" in sides else None
    V = orthogonal(d_out) if "V" in sides else None
    width = d_in if U is None else 2
    index = torch.tensor([0, 3, 4, 9])
    weight = torch.randn(d_out, d_in, dtype=torch.float64)
    selection = Selection(index, (d_out, width), 2)

    def function(x, values, bias):
        holding = weight if U is not None else weight.flatten().index_copy(0, index, values.detach()).view(d_out, d_in)
        return FixedFunction.apply(x, values, holding, bias, U, V, index, selection)

    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in [(3, d_in), (4,), (d_out,)]]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("wanted", ["x", "values", "bias"])
@pytest.mark.parametrize("sides", SIDES)
def test_each_gradient_alone(make, sides, wanted):
    made = make("leading columns", sides)
    x, dy = inputs(made, 6)
    tensors = {"x": x, "values": made.layer.values, "bias": made.layer.bias}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    made.layer(x).backward(dy)
    expected = closed_form(made, x, dy)
    value = {"x": expected.dx, "values": expected.dvalues, "bias": expected.dbias}[wanted]
    torch.testing.assert_close(tensors[wanted].grad, value, **EXACT)
    assert all(tensor.grad is None for name, tensor in tensors.items() if name != wanted)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("case", CASES)
def test_new_values_are_computed_with_and_merged_exactly(make, distance, case, sides):
    made = make(case, sides)
    plain = made.linear.weight.detach()
    rotated = made.V @ plain @ made.U.T
    # Where X is rotated the values are changes of the entries, otherwise the entries themselves.
    held = torch.zeros_like(rotated) if "U" in sides else rotated
    torch.testing.assert_close(made.layer.values.detach(), held[made.places], **EXACT)
    new = torch.randn(made.places[0].numel(), dtype=torch.float64)
    change = torch.zeros_like(rotated)
    change[made.places] = new - held[made.places]
    with torch.no_grad():
        made.layer.values.copy_(new)
    weight = plain + made.V.T @ change @ made.U
    # Before any forward pass, and after one.
    torch.testing.assert_close(made.layer.effective_weight(), weight, **EXACT)
    x, dy = inputs(made, 4)
    y = made.layer(x)
    y.backward(dy)
    expected = closed_form(made, x, dy, weight)
    torch.testing.assert_close(y.detach(), expected.y, **EXACT)
    torch.testing.assert_close(x.grad, expected.dx, **EXACT)
    merged = merge(nn.Sequential(made.layer))[0]
    assert type(merged) is nn.Linear
    assert merged.bias is made.layer.bias
    assert distance(merged(x), y) < 1e-12


def test_without_v_the_weight_is_the_sources_own(orthogonal):
    linear = nn.Linear(5, 7)
    plain = linear.weight.detach().clone()
    index = torch.tensor([3, 9])
    layer = FixedLinear.in_basis(linear, TransitionMatrices(None, None), index)
    assert layer.weight.data_ptr() == layer.to_linear().weight.data_ptr() == linear.weight.data_ptr()
    layer = FixedLinear.in_basis(linear, TransitionMatrices(orthogonal(5, torch.float32)[:2], None), index)
    assert layer.weight.data_ptr() == linear.weight.data_ptr()
    # Which is not written to, and not changed by a rotation there and back.
    layer(torch.randn(3, 5))
    assert torch.equal(linear.weight, plain)
    assert torch.equal(layer.to_linear().weight, plain)


def test_gpt2s_layer_comes_back_as_one(orthogonal):
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    source = Conv1D(7, 5).double()
    nn.init.normal_(source.bias)
    bases = TransitionMatrices(orthogonal(5)[:2], orthogonal(7))
    layer = FixedLinear.in_basis(source, bases, torch.tensor([0, 5, 13]))
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), source(x), **EXACT)
    back = layer.to_linear()
    assert type(back) is Conv1D
    torch.testing.assert_close(back.weight, source.weight, **EXACT)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3), (2, 0)])
def test_any_number_of_leading_dimensions(make, lead):
    made = make("leading columns", "UV")
    x = torch.randn(*lead, 11, dtype=torch.float64, requires_grad=True)
    y = made.layer(x)
    assert y.shape == (*lead, 7)
    y.sum().backward()
    torch.testing.assert_close(
        x.grad.reshape(-1, 11), closed_form(made, x.reshape(-1, 11), torch.ones(y.numel() // 7, 7)).dx, **EXACT
    )


def test_forward_may_be_repeated_before_backward(make):
    made = make("spread", "U")
    pairs = [inputs(made, tokens) for tokens in (4, 1, 3)]
    torch.autograd.backward([made.layer(x) for x, _ in pairs], [dy for _, dy in pairs])
    expected = [closed_form(made, x, dy) for x, dy in pairs]
    torch.testing.assert_close(made.layer.values.grad, sum(e.dvalues for e in expected), **EXACT)
    for (x, _), e in zip(pairs, expected, strict=True):
        torch.testing.assert_close(x.grad, e.dx, **EXACT)


def test_checkpointing_gives_the_same_gradients(make):
    made = make("leading columns", "UV")
    x, _ = inputs(made, 6)
    found = []
    for run in (made.layer, lambda x: checkpoint(made.layer, x, use_reentrant=False)):
        made.layer.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        found.append((made.layer.values.grad, made.layer.bias.grad, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("sides", "width"), [("U", 3), ("UV", 3), ("V", None), ("", None)])
def test_of_x_no_more_is_kept_than_its_leading_directions(make, sides, width):
    made = make("leading columns", sides)
    x, _ = inputs(made, 6)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        made.layer(x)
    own = {t.data_ptr() for t in (*made.layer.parameters(), *made.layer.buffers())}
    extra = [t for t in saved if t.data_ptr() not in own]
    if width is None:
        assert [t.data_ptr() for t in extra] == [x.data_ptr()]
    else:
        assert [tuple(t.shape) for t in extra] == [(6, width)]
        assert extra[0].untyped_storage().nbytes() == 8 * 6 * width


@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 17])
@pytest.mark.parametrize("sides", SIDES)
def test_the_input_gradient_in_blocks_of_tokens(orthogonal, sides, tokens):
    U = orthogonal(5)[:2] if "U" in sides else None
    V = orthogonal(3) if "V" in sides else None
    dy, weight = torch.randn(tokens, 3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    D = torch.randn(3, 2, dtype=torch.float64)
    expected = (dy if V is None else dy @ V.T) @ (weight if U is None else weight + D @ U)
    torch.testing.assert_close(input_gradient(dy, weight, None if U is None else D, U, V), expected, **EXACT)


@pytest.mark.parametrize("values_dtype", [None, torch.float32])
@pytest.mark.parametrize("sides", SIDES)
def test_bfloat16_within_its_rounding(make, sides, values_dtype):
    made = make("spread", sides, dtype=torch.bfloat16, values_dtype=values_dtype)
    x, dy = inputs(made, 11, torch.bfloat16)
    expected = closed_form(made, x, dy)
    y = made.layer(x)
    y.backward(dy)
    gradient = made.layer.values.grad
    assert gradient.dtype == made.layer.values.dtype == (values_dtype or torch.bfloat16)
    assert y.dtype == x.grad.dtype == torch.bfloat16
    # By the norm: bf16 rounds to 2^-8, and a few roundings of each factor stay below ten of them.
    for actual, value in ((y, expected.y), (x.grad, expected.dx), (gradient, expected.dvalues)):
        assert (actual.double() - value).norm() < 10 * 2**-8 * value.norm()


def test_autocast(make):
    made = make("leading columns", "UV", dtype=torch.float32)
    x = torch.randn(6, 11, requires_grad=True)
    dy = torch.randn(6, 7).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made.layer(x)
    y.backward(dy)
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == made.layer.values.grad.dtype == torch.float32
    expected = closed_form(made, x, dy)
    for actual, value in ((y, expected.y), (x.grad, expected.dx), (made.layer.values.grad, expected.dvalues)):
        assert (actual.double() - value).norm() < 10 * 2**-8 * value.norm()


@pytest.mark.parametrize(
    ("index", "directions", "message"),
    [
        ([], None, "vector of at least one"),
        ([[0, 3]], None, "vector of at least one"),
        ([0.0, 3.0], None, "int32 or int64, got torch.float32"),
        ([3, 3], None, "rising and from 0 to 34"),
        ([4, 3], None, "rising and from 0 to 34"),
        ([-1, 3], None, "rising and from 0 to 34"),
        ([0, 35], None, "rising and from 0 to 34"),
        ([0, 14], 2, "rising and from 0 to 13 where entries of 7 x 2 can train"),
    ],
)
def test_positions_that_do_not_fit(orthogonal, index, directions, message):
    index = torch.tensor(index, dtype=None if index else torch.int64)
    U = None if directions is None else orthogonal(5, torch.float32)[:directions]
    with pytest.raises(SparseGradError, match=message):
        FixedLinear.in_basis(nn.Linear(5, 7), TransitionMatrices(U, None), index)


def test_bases_and_layers_that_do_not_fit(orthogonal):
    index, square = torch.tensor([0]), orthogonal(7, torch.float32)
    with pytest.raises(SparseGradError, match="V must be square here, got 2 x 7"):
        FixedLinear.in_basis(nn.Linear(5, 7), TransitionMatrices(None, square[:2]), index)
    with pytest.raises(SparseGradError, match="needs U with 5 columns"):
        FixedLinear.in_basis(nn.Linear(5, 7), TransitionMatrices(square, None), index)
    with pytest.raises(SparseGradError, match="only a plain linear layer can be converted, got a ReLU"):
        FixedLinear.in_basis(nn.ReLU(), TransitionMatrices(None, None), index)


# What is chosen


@pytest.mark.parametrize(("count", "expected"), [(1, torch.int32), (2**31 - 1, torch.int32), (2**31, torch.int64)])
def test_positions_are_as_narrow_as_they_can_be(count, expected):
    assert position_dtype(count) == expected


def test_the_side_with_fewer_dimensions_is_rotated():
    assert fixed_ranks((70, 50), nnz=1) == fixed_ranks((70, 50), nnz=1, sides="smaller") == Ranks(0, 7)
    assert fixed_ranks((50, 70), nnz=1) == Ranks(50, 0)
    assert fixed_ranks((50, 50), nnz=1) == Ranks(0, 7)
    assert fixed_ranks((50, 70), nnz=1, sides="both") == Ranks(50, 9)
    with pytest.raises(SparseGradError, match="sides must be one of smaller, both, got 'left'"):
        fixed_ranks((5, 7), nnz=1, sides="left")
    with pytest.raises(SparseGradError, match="exactly one of nnz and density"):
        fixed_ranks((5, 7))


@pytest.mark.parametrize(
    ("shape", "nnz", "leading"),
    [
        ((100, 80), 1, 10),  # an eighth
        ((100, 81), 1, 11),
        ((100, 80), 250, 10),  # 10 columns of 100: the entries are a quarter of them
        ((100, 80), 251, 11),
        ((100, 80), 1000, 40),
        ((100, 80), 8000, 80),
        ((3, 1), 3, 1),
    ],
)
def test_the_leading_directions_offer_four_times_the_entries(shape, nnz, leading):
    assert fixed_ranks(shape, nnz=nnz) == Ranks(0, leading)
    assert fixed_ranks(shape, density=nnz / (shape[0] * shape[1])) == Ranks(0, leading)


def in_basis(gradient, basis):
    rotated = gradient if basis.V is None else basis.V @ gradient
    return rotated if basis.U is None else rotated @ basis.U.T


def factors(gradient):
    """dY and X, of which dY^T X is the gradient exactly."""
    return torch.eye(len(gradient), dtype=gradient.dtype), gradient


def largest(energy, nnz):
    return energy.flatten().topk(nnz).indices.sort().values


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("directions", [3, 11])
@pytest.mark.parametrize("sides", SIDES)
def test_of_one_gradient_the_largest_entries_are_chosen(orthogonal, sides, directions, tokens):
    basis = TransitionMatrices(
        orthogonal(11)[:directions] if "U" in sides else None, orthogonal(19) if "V" in sides else None
    )
    dy, x = torch.randn(tokens, 19, dtype=torch.float64), torch.randn(tokens, 11, dtype=torch.float64)
    expected = largest(in_basis(dy.T @ x, basis).square(), 6)
    store = EntryStore(basis, (19, 11), 6, torch.float64)
    store.update(dy, x)
    assert store.chosen().dtype == torch.int32
    assert torch.equal(store.chosen().long(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sides", SIDES)
def test_where_every_entry_is_a_candidate_the_choice_is_exact(orthogonal, sides, dtype):
    basis = TransitionMatrices(
        orthogonal(5, dtype) if "U" in sides else None, orthogonal(7, dtype) if "V" in sides else None
    )
    store = EntryStore(basis, (7, 5), 18, dtype)  # 72 candidates are more than there are
    energy = torch.zeros(7, 5, dtype=torch.float64)
    for _ in range(4):
        gradient = torch.randn(7, 5, dtype=dtype)
        energy += in_basis(gradient, basis).double().square()
        store.update(*factors(gradient))
    assert torch.equal(store.chosen().long(), largest(energy, 18))


@pytest.mark.parametrize("sides", SIDES)
def test_blocks_choose_what_the_whole_gradients_would(orthogonal, sides):
    """The definition, entry by entry: old candidates add up, and the others bring what the last gradient has."""
    basis = TransitionMatrices(orthogonal(11)[:9] if "U" in sides else None, orthogonal(19) if "V" in sides else None)
    store = EntryStore(basis, (19, 11), 5, torch.float64)
    candidates = dict.fromkeys(range(20), 0.0)
    # The same rows and columns stand out every time, so that candidates stay.
    loud = torch.rand(19, dtype=torch.float64) ** 2, torch.rand(11, dtype=torch.float64) ** 2
    for _ in range(5):
        dy, x = (torch.randn(4, len(scale), dtype=torch.float64) * scale for scale in loud)
        store.update(dy, x)
        energy = in_basis(dy.T @ x, basis).square().flatten().tolist()
        energy = {i: candidates.get(i, 0) + each for i, each in enumerate(energy)}
        candidates = {i: energy[i] for i in sorted(energy, key=energy.get, reverse=True)[:20]}
        found = dict(zip(store.index.tolist(), store.energy.tolist(), strict=True))
        assert found == pytest.approx(candidates, rel=1e-9)
    assert store.chosen().tolist() == sorted(sorted(candidates, key=candidates.get, reverse=True)[:5])


@pytest.mark.parametrize("nnz", [30, 96])  # 96 of 128 entries, all of which are candidates
def test_no_entry_is_chosen_twice_where_most_are_zero(nnz):
    gradient = torch.zeros(16, 8)
    gradient[0, 0], gradient[9, 4] = 1, 2
    store = EntryStore(TransitionMatrices(None, None), (16, 8), nnz)
    for _ in range(2):
        store.update(*factors(gradient))
    chosen = store.chosen()
    assert len(chosen) == len(chosen.unique()) == nnz
    assert {0, 9 * 8 + 4} <= set(chosen.tolist())


@pytest.mark.parametrize("sides", SIDES)
def test_no_gradient_exists_whole_to_choose_by(orthogonal, sides, allocations):
    d_out, d_in, directions = 400, 320, 40
    U = orthogonal(d_in, torch.float32)[:directions] if "U" in sides else None
    V = orthogonal(d_out, torch.float32) if "V" in sides else None
    store = EntryStore(TransitionMatrices(U, V), (d_out, d_in), 10)
    with allocations() as made:
        store.update(torch.randn(3, d_out), torch.randn(3, d_in))
    # An eighth of G~, and one place.
    width = d_in if U is None else directions
    assert made.largest == max(4 * (d_out // 8 * width + 1), 4 * 3 * d_out)


def test_candidates_add_up_what_is_forgotten_begins_anew(monkeypatch):
    monkeypatch.setattr(fixed, "CANDIDATES", 2)
    store = EntryStore(TransitionMatrices(None, None), (1, 6), 1)
    for row in ([3, 2, 0, 0, 0, 1], [0, 0, 2.5, 2.4, 0, 0], [0, 2.2, 0, 0, 2.6, 0], [0, 2.2, 0, 0, 0, 0]):
        store.update(*factors(torch.tensor([row], dtype=torch.float32)))
    # 9 and 4; 9 and 6.25 (the 4 is forgotten); 9 and 6.76 (4.84 is not among them); 9 and 6.76.
    found = dict(zip(store.index.tolist(), store.energy.tolist(), strict=True))
    assert found.keys() == {0, 4}
    assert found[0] == 9
    assert found[4] == pytest.approx(2.6**2)
    # The dense sum would have chosen the second: 4 + 2 * 2.2^2 = 13.68.
    assert store.chosen().tolist() == [0]


def test_what_is_stored_has_one_size(orthogonal):
    store = EntryStore(TransitionMatrices(None, orthogonal(19, torch.float32)), (19, 11), 6)
    for _ in range(3):
        assert store.index.shape == store.energy.shape == (24,)
        assert store.index.unique().numel() == 24
        store.update(torch.randn(3, 19), torch.randn(3, 11))


def test_more_entries_than_the_directions_offer(orthogonal):
    with pytest.raises(SparseGradError, match="22 entries cannot be chosen of 21: U needs more directions"):
        EntryStore(TransitionMatrices(orthogonal(5)[:3], None), (7, 5), 22)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite(bad):
    store = EntryStore(TransitionMatrices(None, None), (7, 5), 3)
    gradient = torch.ones(7, 5)
    gradient[3, 2] = bad
    with pytest.raises(SparseGradError, match="NaN or infinity"):
        store.update(*factors(gradient))
    assert torch.equal(store.energy, torch.zeros(12))


# A model


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


LAYERS = {"up": ["0.up", "1.up"], "down": ["0.down", "1.down"]}
SHAPES = {"up": (7, 5), "down": (5, 7)}


def backward(model, batch):
    model(batch).square().sum().backward()


def prepared(sides="smaller", nnz=4):
    model = nn.Sequential(Block(), Block()).double()
    batches = [torch.randn(4, 5, dtype=torch.float64) for _ in range(3)]
    ranks = {kind: fixed_ranks(shape, nnz=nnz, sides=sides) for kind, shape in SHAPES.items()}
    return model, batches, calibrate(model, LAYERS, batches, backward, ranks)


@pytest.mark.parametrize("sides", ["smaller", "both"])
def test_a_model_is_converted_trained_and_merged(sides, unchanged):
    model, batches, bases = prepared(sides)
    x, weights = (
        batches[0],
        {name: model.get_submodule(name).weight.detach() for names in LAYERS.values() for name in names},
    )
    before = model(x).detach()
    with unchanged(model):
        chosen = choose_entries(model, LAYERS, bases, batches, backward, nnz=4)
    assert {kind: tuple(None if m is None else m.shape[0] for m in (b.U, b.V)) for kind, b in bases.items()} == {
        # ceil(16 / 7) = 3 of the 5 directions, ceil(16 / 5) = 4 of the 7.
        "up": (3, 7 if sides == "both" else None),
        "down": (4 if sides == "both" else None, 5),
    }
    assert convert_fixed(model, LAYERS, bases, chosen) is model
    torch.testing.assert_close(model(x), before, **EXACT)
    optimizer = torch.optim.AdamW([model.get_submodule(name).values for name in chosen], lr=0.1, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        backward(model, x)
        optimizer.step()
    trained = model(x).detach()
    assert (trained - before).abs().max() > 1e-2
    merge(model)
    torch.testing.assert_close(model(x), trained, **EXACT)
    for kind, names in LAYERS.items():
        for name in names:
            change = in_basis(model.get_submodule(name).weight.detach() - weights[name], bases[kind])
            assert torch.equal((change.abs() > 1e-9).flatten().nonzero().squeeze(1), chosen[name].long())


def test_the_entries_are_those_of_the_models_gradients():
    model, batches, bases = prepared(nnz=18)
    chosen = choose_entries(model, LAYERS, bases, batches, backward, density=0.5)
    energy = {}
    for batch in batches:
        model.zero_grad()
        backward(model, batch)
        for kind, names in LAYERS.items():
            for name in names:
                gradient = in_basis(model.get_submodule(name).weight.grad, bases[kind])
                energy[name] = energy.get(name, 0) + gradient.square()
    for name, index in chosen.items():
        # 18 of 35 (17.5 rounds to even), every one a candidate: exact.
        assert torch.equal(index.long(), largest(energy[name], 18))


def test_without_a_batch_nothing_can_be_chosen(unchanged):
    model, _, bases = prepared()
    with unchanged(model), pytest.raises(SparseGradError, match=r"no gradient of '0\.up' arrived.*at least one batch"):
        choose_entries(model, LAYERS, bases, [], backward, nnz=4)
    with pytest.raises(SparseGradError, match="exactly one of nnz and density"):
        choose_entries(model, LAYERS, bases, [], backward)


def test_what_does_not_fit_converts_nothing(unchanged):
    model, batches, bases = prepared()
    chosen = choose_entries(model, LAYERS, bases, batches, backward, nnz=4)
    with unchanged(model):
        with pytest.raises(SparseGradError, match="no transition matrices are given for kind 'down'"):
            convert_fixed(model, LAYERS, {"up": bases["up"]}, chosen)
        with pytest.raises(SparseGradError, match=r"no entries are given for layer '1\.down'"):
            convert_fixed(model, LAYERS, bases, {name: index for name, index in chosen.items() if name != "1.down"})
        with pytest.raises(SparseGradError, match="rising and from 0 to 34"):
            convert_fixed(model, LAYERS, bases, {**chosen, "1.down": torch.tensor([35])})
        leading = TransitionMatrices(None, bases["down"].V[:2])
        with pytest.raises(SparseGradError, match="V must be square"):
            convert_fixed(model, LAYERS, {**bases, "down": leading}, chosen)
    convert_fixed(model, LAYERS, bases, chosen)
    with pytest.raises(SparseGradError, match="converted already"):
        convert_fixed(model, LAYERS, bases, chosen)
