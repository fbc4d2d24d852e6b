"""CoreLinear against the closed forms, in float64: `Y = X (W + V^T C U)^T + b`, `dL/dC = V (dL/dY)^T X U^T`."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sparsegrad import (
    CoreLinear,
    Ranks,
    SparseGradError,
    TransitionMatrices,
    calibrate,
    convert_core,
    core_shape,
    find_layers,
    merge,
)
from sparsegrad.core import MOST_K_OUT, CoreFunction

# (D_out, D_in, k_out, k_in): prime, wide and tall, one row or column, one entry, all of them; 0: V is the identity.
SHAPES = [
    (7, 5, 3, 2),
    (5, 11, 2, 7),
    (1, 3, 1, 2),
    (3, 1, 2, 1),
    (7, 5, 1, 1),
    (7, 5, 7, 5),
    (7, 5, 0, 2),
    (5, 11, 0, 1),
]


@pytest.fixture
def make(orthogonal):
    """A linear layer, a core layer made from a copy of it, with a core that is not zero, and the bases in float64."""

    def build(d_out=7, d_in=5, k_out=3, k_in=2, *, bias=True, dtype=torch.float64, core_dtype=None, source=None):
        linear = nn.Linear(d_in, d_out, bias=bias, dtype=dtype) if source is None else source
        U, V = orthogonal(d_in, dtype)[:k_in], orthogonal(d_out, dtype)[:k_out] if k_out else None
        layer = CoreLinear(copy.deepcopy(linear), TransitionMatrices(U, V), core_dtype)
        nn.init.normal_(layer.core)
        V = torch.eye(d_out) if V is None else V
        return SimpleNamespace(linear=linear, layer=layer, U=U.double(), V=V.double())

    return build


def closed_form(made, x, dy) -> SimpleNamespace:
    """What a pass over X (T, D_in) and dL/dY (T, D_out) must give."""
    x, dy, U, V = x.detach().double(), dy.double(), made.U, made.V
    weight = made.linear.weight.detach().double()
    weight = (weight if isinstance(made.linear, nn.Linear) else weight.T) + V.T @ made.layer.core.detach().double() @ U
    y = x @ weight.T
    if made.linear.bias is not None:
        y = y + made.linear.bias.detach().double()
    return SimpleNamespace(y=y, dx=dy @ weight, dbias=dy.sum(0), dcore=V @ (dy.T @ x) @ U.T, weight=weight)


def data(shape, tokens=6, dtype=torch.float64):
    return torch.randn(tokens, shape[1], dtype=dtype, requires_grad=True), torch.randn(tokens, shape[0], dtype=dtype)


# Values and gradients


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_are_the_closed_forms(make, distance, shape, tokens, bias, dtype, rounding):
    made = make(*shape, bias=bias, dtype=dtype)
    x, dy = data(shape, tokens, dtype)
    expected = closed_form(made, x, dy)
    y = made.layer(x)
    y.backward(dy)
    assert y.dtype == x.grad.dtype == made.layer.core.grad.dtype == dtype
    assert distance(y, expected.y) < rounding
    assert distance(x.grad, expected.dx) < rounding
    assert distance(made.layer.core.grad, expected.dcore) < rounding
    if bias:
        assert distance(made.layer.bias.grad, expected.dbias) < rounding
    assert torch.equal(made.layer.weight, made.linear.weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 3, 2, 2), (3, 5, 3, 1), (1, 2, 1, 1), (5, 3, 0, 2)])
def test_gradcheck(make, shape, bias):
    layer = make(*shape, bias=bias).layer
    x, _ = data(shape, 4)

    def function(x, core, bias=None):
        return CoreFunction.apply(x, layer.weight, bias, core, layer.basis.U, layer.basis.V)

    assert torch.autograd.gradcheck(function, (x, layer.core, *([layer.bias] if bias else [])))


@pytest.mark.parametrize("live", [[], [3], [0, 2, 4], [5]])
def test_rows_of_zeros_in_dy(make, live):
    made = make()
    x, dy = data((7, 5))
    dy = torch.zeros_like(dy).index_copy_(0, torch.tensor(live, dtype=torch.long), dy[live])
    expected = closed_form(made, x, dy)
    made.layer(x).backward(dy)
    torch.testing.assert_close(x.grad, expected.dx, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(made.layer.core.grad, expected.dcore, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(made.layer.bias.grad, expected.dbias, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("live", "paid"), [(range(6), 6), ([1, 4], 2)])
def test_backward_pays_for_tokens_that_reach_the_loss(make, live, paid):
    d_out, d_in, k_out, k_in = 7, 5, 3, 2
    made = make(d_out, d_in, k_out, k_in)
    x, dy = data((d_out, d_in))
    dy = torch.zeros_like(dy).index_copy_(0, torch.tensor(live), dy[list(live)])
    y = made.layer(x)
    with FlopCounterMode(display=False) as counter:
        y.backward(dy)
    # dL/dY V^T, dL/dC, its product with C, dL/dY W; the counter leaves out what is added in place.
    assert counter.get_total_flops() == 2 * paid * (k_out * d_out + 2 * k_out * k_in + d_out * d_in)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3), (2, 0)])
def test_any_number_of_leading_dimensions(make, lead):
    made = make()
    x = torch.randn(*lead, 5, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(*lead, 7, dtype=torch.float64)
    expected = closed_form(made, x.reshape(-1, 5), dy.reshape(-1, 7))
    y = made.layer(x)
    y.backward(dy)
    assert y.shape == (*lead, 7)
    torch.testing.assert_close(y.reshape(-1, 7), expected.y, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(x.grad.reshape(-1, 5), expected.dx, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(made.layer.core.grad, expected.dcore, rtol=1e-12, atol=1e-13)


def test_inputs_and_upstream_gradients_that_are_not_contiguous(make, distance):
    made = make()
    x = torch.randn(5, 3, 2, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    dy = torch.randn(1, 1, 7, dtype=torch.float64).expand(2, 3, 7)
    expected = closed_form(made, x.reshape(-1, 5), dy.reshape(-1, 7))
    made.layer(x).backward(dy)
    assert distance(made.layer.core.grad, expected.dcore) < 1e-12
    assert distance(made.layer.bias.grad, expected.dbias) < 1e-12


# Autograd


@pytest.mark.parametrize("wanted", ["x", "core", "bias"])
def test_each_gradient_alone(make, distance, wanted):
    made = make()
    x, dy = data((7, 5))
    tensors = {"x": x, "core": made.layer.core, "bias": made.layer.bias}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    made.layer(x).backward(dy)
    expected = closed_form(made, x, dy)
    assert (
        distance(tensors[wanted].grad, getattr(expected, {"x": "dx", "core": "dcore", "bias": "dbias"}[wanted])) < 1e-12
    )
    assert all(tensor.grad is None for name, tensor in tensors.items() if name != wanted)


def test_gradients_of_several_passes_add_up(make, distance):
    made = make()
    passes = [data((7, 5), tokens) for tokens in (4, 1, 3)]
    torch.autograd.backward([made.layer(x) for x, _ in passes], [dy for _, dy in passes])
    expected = [closed_form(made, x, dy) for x, dy in passes]
    assert distance(made.layer.core.grad, sum(e.dcore for e in expected)) < 1e-12
    for (x, _), e in zip(passes, expected, strict=True):
        assert distance(x.grad, e.dx) < 1e-12


def test_checkpointing_gives_the_same_gradients(make):
    made = make()
    x, _ = data((7, 5))
    found = []
    for run in (made.layer, lambda x: checkpoint(made.layer, x, use_reentrant=False)):
        made.layer.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        found.append((made.layer.core.grad, made.layer.bias.grad, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("k_out", [3, 0])
def test_nothing_of_the_inputs_width_is_saved_for_backward(make, k_out):
    made = make(7, 5, k_out, 2)
    x, _ = data((7, 5))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        made.layer(x)
    layer = made.layer
    kept = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
    extra = [t for t in saved if t.untyped_storage().data_ptr() not in kept]
    assert [t.shape for t in extra] == [(6, 2)]
    assert extra[0].untyped_storage().nbytes() == 6 * 2 * 8


# Narrow types


@pytest.mark.parametrize("k_out", [11, 0])
@pytest.mark.parametrize("core_dtype", [None, torch.float32])
def test_bfloat16_trains_within_its_rounding(make, core_dtype, k_out):
    made = make(61, 48, k_out, 13, dtype=torch.bfloat16, core_dtype=core_dtype)
    x, dy = data((61, 48), dtype=torch.bfloat16)
    y = made.layer(x)
    y.backward(dy)
    assert made.layer.core.grad.dtype == made.layer.core.dtype == (core_dtype or torch.bfloat16)
    assert y.dtype == x.grad.dtype == torch.bfloat16
    expected = closed_form(made, x, dy)
    # Error of a sum of rounded terms, by its norm: bf16 rounds to 2^-8, and there are fewer than ten roundings.
    for actual, value in ((y, expected.y), (x.grad, expected.dx), (made.layer.core.grad, expected.dcore)):
        assert (actual.double() - value).norm() < 10 * 2**-8 * value.norm()


@pytest.mark.parametrize("k_out", [3, 0])
def test_autocast_trains_as_a_linear_layer_does(make, k_out):
    made = make(k_out=k_out, dtype=torch.float32)
    x, dy = data((7, 5), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made.layer(x)
    y.backward(dy.bfloat16())
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == made.layer.core.grad.dtype == made.layer.bias.grad.dtype == torch.float32
    expected = closed_form(made, x, dy)
    for actual, value in ((y, expected.y), (x.grad, expected.dx), (made.layer.core.grad, expected.dcore)):
        assert (actual.double() - value).norm() < 10 * 2**-8 * value.norm()


# In and out


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_merging_is_exact(make, distance, shape, bias):
    made = make(*shape, bias=bias)
    x, dy = data(shape)
    expected = closed_form(made, x, dy)
    merged = merge(made.layer.eval())
    assert type(merged) is nn.Linear
    assert not merged.training
    assert merged.bias is made.layer.bias
    assert distance(merged.weight, expected.weight) < 1e-12
    assert distance(merged(x), expected.y) < 1e-12
    assert torch.equal(made.layer.weight, made.linear.weight)


def test_merging_rounds_once(make):
    made = make(61, 48, 11, 13, dtype=torch.bfloat16, core_dtype=torch.float32)
    expected = made.linear.weight.double() + made.V.T @ made.layer.core.double() @ made.U
    half_a_unit = torch.finfo(torch.bfloat16).eps / 2 * (1 + 1e-6)
    torch.testing.assert_close(made.layer.to_linear().weight.double(), expected, rtol=half_a_unit, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_conv1d_goes_in_and_comes_out(make, distance, shape):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    source = conv1d(*shape[:2]).double()
    nn.init.normal_(source.weight)
    nn.init.normal_(source.bias)
    made = make(*shape, source=source)
    x, dy = data(shape)
    expected = closed_form(made, x, dy)
    y = made.layer(x)
    y.backward(dy)
    assert distance(y, expected.y) < 1e-12
    assert distance(x.grad, expected.dx) < 1e-12
    assert distance(made.layer.core.grad, expected.dcore) < 1e-12
    merged = made.layer.to_linear()
    assert type(merged) is conv1d
    assert merged.weight.is_contiguous()
    assert distance(merged(x), expected.y) < 1e-12


def test_a_new_core_changes_nothing_and_shares_the_sources_storage(orthogonal):
    linear = nn.Linear(5, 7)
    basis = TransitionMatrices(orthogonal(5, torch.float32)[:2], orthogonal(7, torch.float32)[:3])
    layer = CoreLinear(linear, basis)
    x = torch.randn(6, 5)
    assert torch.equal(layer(x), linear(x))
    assert layer.weight.data_ptr() == linear.weight.data_ptr()
    assert not layer.weight.requires_grad
    assert layer.bias is linear.bias
    assert layer.core.shape == (3, 2)
    assert "core=3x2" in repr(layer)
    assert {name for name, _ in layer.named_parameters()} == {"weight", "core", "bias"}


@pytest.mark.parametrize(
    ("source", "U", "V", "message"),
    [
        (nn.Linear(5, 7), (2, 7), (3, 5), "7 x 5 .* needs U with 5 columns, got 2 x 7"),  # swapped
        (nn.Linear(5, 7), (2, 5), (3, 8), "needs V with 7 columns, got 3 x 8"),
        (nn.Linear(5, 7), None, (3, 7), "a core needs U, and it is None"),
        (nn.Linear(5, 7, dtype=torch.float64), (2, 5), (3, 7), "U is torch.float32 .* the weight torch.float64"),
        (nn.LayerNorm(5), (2, 5), (3, 5), "only a plain linear layer .* got a LayerNorm"),
    ],
)
def test_what_does_not_fit_is_refused(source, U, V, message):
    basis = TransitionMatrices(*(None if shape is None else torch.ones(shape) for shape in (U, V)))
    with pytest.raises(SparseGradError, match=message):
        CoreLinear(source, basis)


# A whole model


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_model_is_calibrated_converted_trained_and_merged(tiny, distance, family):
    model, batch = tiny(family)
    model.double()
    before = model(**batch).logits
    layers = find_layers(model)
    bases = calibrate(model, layers, [batch, batch], ranks={kind: Ranks(3, 2) for kind in layers})
    assert convert_core(model, layers, bases) is model
    assert distance(model(**batch).logits, before) < 1e-12
    cores = [model.get_submodule(name) for names in layers.values() for name in names]
    assert all(model.get_submodule(name).basis is bases[kind] for kind in layers for name in layers[kind])
    model(**batch).loss.backward()
    with torch.no_grad():
        for layer in cores:
            layer.core.sub_(layer.core.grad, alpha=1 / layer.core.grad.abs().max())
    trained = model(**batch).logits
    assert distance(trained, before) > 1e-3
    merge(model)
    assert not any(isinstance(module, CoreLinear) for module in model.modules())
    assert distance(model(**batch).logits, trained) < 1e-10


def test_cores_of_another_dtype(tiny):
    model, batch = tiny("bert")
    layers = find_layers(model)
    bases = calibrate(model, layers, [batch], ranks={kind: Ranks(3, 2) for kind in layers})
    convert_core(model, layers, bases, dtype=torch.float64)
    assert {m.core.dtype for m in model.modules() if isinstance(m, CoreLinear)} == {torch.float64}


def test_conversions_that_do_not_fit_change_nothing(tiny, unchanged):
    model, batch = tiny("bert")
    layers = find_layers(model)
    bases = calibrate(model, layers, [batch], ranks={kind: Ranks(3, 2) for kind in layers})
    wrong = {
        "no transition matrices are given for kind 'down'": {"up": bases["up"]},
        "needs U with": {"up": bases["up"], "down": bases["up"]},
        "a core needs U": {**bases, "down": TransitionMatrices(None, bases["down"].V)},
    }
    for message, given in wrong.items():
        with unchanged(model), pytest.raises(SparseGradError, match=message):
            convert_core(model, layers, given)
    convert_core(model, layers, bases)
    with unchanged(model), pytest.raises(SparseGradError, match="converted already"):
        convert_core(model, layers, bases)


# The shape of a core


def cost(core, shape):
    return core[0] * shape[0] + core[1] * shape[1]


@pytest.mark.parametrize(
    ("entries", "shape", "expected"),
    [
        # 1000 = k_out k_in in a weight of 100 x 40: k_out = 20, k_in = 50 is cheapest, but there are 40 columns:
        # 25 x 40 is the cheapest that fits, and of 25 .. 33 rows 25 alone divides 1000.
        (1000, (100, 40), (25, 40)),
        # sqrt(400) = 20 rows are cheapest, 27 a third more; 20 and 25 divide 400.
        (400, (100, 100), (25, 16)),
        # 397 is prime; of 20 .. 27 rows 22 divide 396.
        (397, (100, 100), (22, 18)),
        (1, (5, 7), (1, 1)),
        (35, (5, 7), (5, 7)),
        (34, (5, 7), (5, 6)),
        (3, (1, 9), (1, 3)),
        (3, (9, 1), (3, 1)),
    ],
)
def test_core_shape(entries, shape, expected):
    assert core_shape(entries, shape) == expected


@pytest.mark.parametrize("shape", [(3072, 768), (768, 3072), (11008, 4096), (4096, 11008), (1536, 384), (1024, 1024)])
def test_core_shape_is_cheap_and_holds_what_lora_holds(shape):
    d_out, d_in = shape
    for rank in (1, 7, 16):
        entries = rank * (d_out + d_in)
        core = core_shape(entries, shape)
        held = core.k_out * core.k_in
        assert entries - 16 <= held <= entries
        # Bases of the cheapest core with as many entries, were there fractions of directions, and what it saves.
        ratio = core.k_out / math.sqrt(held * d_in / d_out)
        assert cost(core, shape) <= (MOST_K_OUT + 1 / MOST_K_OUT) / 2 * 1.02 * 2 * math.sqrt(held * d_out * d_in)
        assert 0.95 <= ratio <= MOST_K_OUT * 1.05


@pytest.mark.parametrize("shape", [(7, 5), (5, 11), (1, 13), (13, 1), (6, 6)])
def test_core_shape_of_every_budget_fits_and_never_shrinks(shape):
    held = []
    for entries in range(1, shape[0] * shape[1] + 1):
        core = core_shape(entries, shape)
        assert 1 <= core.k_out <= shape[0]
        assert 1 <= core.k_in <= shape[1]
        held.append(core.k_out * core.k_in)
        assert held[-1] <= entries
    assert held == sorted(held)
    assert held[-1] == shape[0] * shape[1]


@pytest.mark.parametrize("entries", [0, -1, 36, True, 1.5])
def test_budgets_out_of_range_are_refused(entries):
    with pytest.raises(SparseGradError, match="from 1 to 35 for a weight of 5 x 7"):
        core_shape(entries, (5, 7))
