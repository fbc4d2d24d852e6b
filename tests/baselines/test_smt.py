"""Sparse Matrix Tuning: which blocks train, their gradients, what is saved of X, and what moves."""

import pytest
import torch
from torch import nn

from baselines.method import MethodError, Setting
from baselines.registry import get
from baselines.smt import SMTLinear, block_side, choose_blocks
from sparsegrad import SparseGradError, find_layers
from sparsegrad.adapted import adapted_layers, is_transposed

FLOAT64 = {"rtol": 1e-12, "atol": 1e-13}


@pytest.mark.parametrize(
    ("shapes", "side"),
    [
        ([(3072, 768), (768, 3072)], 256),
        ([(11008, 4096), (4096, 11008)], 256),
        ([(1536, 384), (384, 1536)], 192),
        ([(1536, 576), (576, 1536), (192, 576)], 192),
        ([(16, 24)], 8),
        ([(48, 48)], 48),
        ([(5, 7)], 1),
    ],
)
def test_side_of_a_block(shapes, side):
    assert block_side(shapes) == side
    assert all(dimension % side == 0 for shape in shapes for dimension in shape)


# 6 blocks of 256 leave 64 of 1600 over. Blocks of 5 leave 2 of 37 and 3 of 53 over, all larger ones more than a 16th.
@pytest.mark.parametrize(("shape", "side", "blocks"), [((6400, 1600), 256, 25 * 6), ((37, 53), 5, 7 * 10)])
def test_a_little_at_the_end_may_be_left_over(shape, side, blocks):
    assert block_side([shape]) == side
    assert get("smt").largest_budget([shape]) == blocks


def test_budget_is_counted_over_all_layers():
    shapes = [(1536, 384), (384, 1536)] * 6
    method = get("smt")(4, Setting({}))
    assert method.budget_params(shapes) == 4 * 192 * 192
    assert get("smt").largest_budget(shapes) == 12 * 8 * 2
    # In blocks of 8 x 8.
    assert get("smt").largest_budget([(16, 24), (24, 16)]) == 2 * 6
    with pytest.raises(MethodError, match="at most 12 for these layers"):
        get("smt")(13, Setting({})).check_budget_fits([(16, 24), (24, 16)])


SCORES = {
    "a": torch.tensor([[3.0, 0.1, 9.0], [0.2, 0.3, 0.4]]),
    "b": torch.tensor([[0.5], [0.6], [0.7]]),
    "c": torch.tensor([[8.0, 7.0], [1.0, 6.0]]),
}


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, {"a": [(0, 2)], "b": [], "c": []}),
        (5, {"a": [(0, 0), (0, 2)], "b": [], "c": [(0, 0), (0, 1), (1, 1)]}),
        (7, {"a": [(0, 0), (0, 2)], "b": [(2, 0)], "c": [(0, 0), (0, 1), (1, 0), (1, 1)]}),
    ],
)
def test_the_largest_over_all_layers_are_chosen(count, expected):
    assert choose_blocks(SCORES, count) == expected


# T, D_in, D_out, l, blocks (i, j).
CASES = {
    "one": (5, 6, 9, 3, [(2, 1)]),
    "columns shared": (7, 6, 9, 3, [(0, 1), (2, 1)]),
    "rows shared": (4, 8, 4, 2, [(1, 0), (1, 3)]),
    "spread": (6, 15, 10, 5, [(0, 1), (1, 0), (1, 1)]),
    "one token": (1, 9, 6, 3, [(0, 2), (1, 0)]),
    "all of X": (5, 6, 4, 2, [(0, 0), (0, 1), (1, 2)]),
    "none": (5, 6, 4, 2, []),
    "all but what is left over": (5, 17, 18, 8, [(0, 0), (1, 1)]),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_gradients_and_what_is_saved(case, bias):
    torch.manual_seed(0)
    tokens, d_in, d_out, side, blocks = CASES[case]
    linear = nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64)
    weight = linear.weight.detach().clone()
    layer = SMTLinear(linear, blocks, side)
    x = torch.randn(tokens, d_in, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(tokens, d_out, dtype=torch.float64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    y.backward(dy)
    X = x.detach()
    torch.testing.assert_close(y.detach(), X @ weight.T + (linear.bias.detach() if bias else 0), **FLOAT64)
    torch.testing.assert_close(x.grad, dy @ weight, **FLOAT64)
    assert layer.weight.grad is None
    if bias:
        torch.testing.assert_close(layer.bias.grad, dy.sum(0), **FLOAT64)

    columns = {j for _, j in blocks}
    saved = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    del saved[layer.weight.untyped_storage().data_ptr()]
    if case == "all of X":
        assert list(saved) == [X.untyped_storage().data_ptr()]
    else:
        assert X.untyped_storage().data_ptr() not in saved
        assert sum(saved.values()) == 8 * tokens * side * len(columns)
    if not blocks:
        assert layer.values is None
        return
    dense = dy.T @ X
    for gradient, (i, j) in zip(layer.values.grad, blocks, strict=True):
        torch.testing.assert_close(gradient, dense[i * side : (i + 1) * side, j * side : (j + 1) * side], **FLOAT64)

    with torch.no_grad():
        layer.values.add_(1.0)
    for i, j in blocks:
        weight[i * side : (i + 1) * side, j * side : (j + 1) * side] += 1.0
    torch.testing.assert_close(layer.effective_weight(), weight, **FLOAT64)
    torch.testing.assert_close(layer.to_linear().weight.detach(), weight, **FLOAT64)


@pytest.mark.parametrize("rest", ["all", "none"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_only_the_blocks_with_the_largest_mean_gradient_move(family, rest, build_model, batches, train):
    model, twin = build_model(family, torch.float64), build_model(family, torch.float64)
    layers, side, count, steps = find_layers(model), 8, 5, 3
    everything = {name for name, _ in model.named_parameters()}
    method = get("smt")(count, Setting(layers, train_rest=rest, calibration_steps=steps))
    state = torch.get_rng_state()
    method.prepare(model, batches(model))
    assert torch.equal(torch.get_rng_state(), state)

    names = [name for of_kind in layers.values() for name in of_kind]
    transposed = is_transposed(twin.get_submodule(names[0]))
    means, before = {}, {}
    source = batches(twin)
    for _ in range(steps):
        twin.zero_grad(set_to_none=True)
        twin(**next(source)).loss.backward()
        for name in names:
            weight = twin.get_submodule(name).weight
            gradient, before[name] = (each.T if transposed else each for each in (weight.grad, weight.detach()))
            for i in range(gradient.shape[0] // side):
                for j in range(gradient.shape[1] // side):
                    block = gradient[i * side : (i + 1) * side, j * side : (j + 1) * side]
                    means[name, i, j] = means.get((name, i, j), 0.0) + block.abs().mean().item()
    chosen = set(sorted(means, key=means.get, reverse=True)[:count])
    assert {(name, i, j) for name, layer in adapted_layers(model) for i, j in layer.blocks} == chosen

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = {f"{name}.values" for name, _, _ in chosen}
    weights = {f"{name}.weight" for name in names}
    head = {name for name in everything if name.startswith("classifier.")}
    assert trained == own | (everything - weights if rest == "all" else head)

    train(method, model, count=3, lr=1e-2)
    exported = method.export(model)
    moved = set()
    for name in names:
        weight = exported.get_submodule(name).weight.detach()
        changed = (weight.T if transposed else weight) != before[name]
        moved |= {(name, i // side, j // side) for i, j in changed.nonzero().tolist()}
        for i, j in {(i, j) for of, i, j in chosen if of == name}:
            assert changed[i * side : (i + 1) * side, j * side : (j + 1) * side].all()
    assert moved == chosen


def backward(model, batch):
    model(batch[0]).backward(batch[1])


def batches_of(d_in, d_out, scale=1.0):
    generator = torch.Generator().manual_seed(2)
    while True:
        yield [scale * torch.randn(5, side, generator=generator, dtype=torch.float64) for side in (d_in, d_out)]


def test_steps_are_adams_on_the_blocks():
    torch.manual_seed(0)
    d_in, d_out, side, lr = 6, 9, 3, 0.01
    model = nn.Sequential(nn.Linear(d_in, d_out, dtype=torch.float64))
    weight = model[0].weight.detach().clone()
    method = get("smt")(2, Setting({"linear": ["0"]}, backward=backward, calibration_steps=2))
    method.prepare(model, batches_of(d_in, d_out))
    mask = torch.zeros_like(weight)
    for i, j in model[0].blocks:
        mask[i * side : (i + 1) * side, j * side : (j + 1) * side] = 1
    assert mask.sum() == 2 * side * side == method.budget_params([(d_out, d_in)])
    optimizers = method.optimizers(model, lr)
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    stream = batches_of(d_in, d_out)
    for t in range(1, 5):
        x, dy = next(stream)
        model.zero_grad(set_to_none=True)
        model(x).backward(dy)
        for optimizer in optimizers:
            optimizer.step()
        g = (dy.T @ x) * mask
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        weight = weight - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    torch.testing.assert_close(method.export(model)[0].weight.detach(), weight, rtol=1e-10, atol=1e-12)


def test_what_no_block_covers_does_not_move():
    torch.manual_seed(0)
    d_in, d_out, side = 17, 33, 16
    model = nn.Sequential(nn.Linear(d_in, d_out, dtype=torch.float64))
    before = model[0].weight.detach().clone()
    method = get("smt")(2, Setting({"linear": ["0"]}, backward=backward, calibration_steps=1))
    method.prepare(model, batches_of(d_in, d_out))
    optimizers = method.optimizers(model, 0.01)
    backward(model, next(batches_of(d_in, d_out)))
    for optimizer in optimizers:
        optimizer.step()
    changed = method.export(model)[0].weight.detach() != before
    assert changed[: 2 * side, :side].all()
    assert int(changed.sum()) == 2 * side * side


def test_float32_values_of_bfloat16_weights():
    torch.manual_seed(0)
    layer = SMTLinear(nn.Linear(6, 4, dtype=torch.bfloat16), [(1, 2)], 2, torch.float32)
    before = layer.values.detach().clone()
    x, dy = torch.randn(3, 6, dtype=torch.bfloat16), torch.randn(3, 4, dtype=torch.bfloat16)
    layer(x).backward(dy)
    assert layer.values.grad.dtype == torch.float32
    torch.testing.assert_close(layer.values.grad[0], dy[:, 2:].float().T @ x[:, 4:].float(), rtol=2**-7, atol=2**-7)
    with torch.no_grad():
        # Less than half of a bfloat16 step.
        layer.values.mul_(1 + 2**-12)
    assert torch.equal(layer.effective_weight()[2:, 4:], before[0].to(torch.bfloat16))
    assert not torch.equal(layer.values, before)


def test_formula_bounds_what_is_saved_where_blocks_share_columns():
    method = get("smt")(2, Setting({}))
    # Blocks of 4 x 4 in 8 x 12: two columns of blocks of three, at most.
    claim = method.formula((8, 12), tokens=5, dtype=torch.float32)
    assert (claim.activation, claim.keeps_input) == (4 * 5 * 8, False)
    assert (claim.parameter, claim.gradient, claim.optimizer) == (4 * (96 + 32), 4 * 32, 8 * 32)
    whole = get("smt")(3, Setting({})).formula((8, 12), tokens=5, dtype=torch.float32)
    assert (whole.activation, whole.keeps_input) == (0, True)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [(iter(()), MethodError, "no gradient of '0' arrived"), (batches_of(6, 9, 1e300), SparseGradError, "layer '0'")],
)
def test_gradients_that_cannot_choose(given, error, message):
    model = nn.Sequential(nn.Linear(6, 9, dtype=torch.float64))
    with pytest.raises(error, match=message):
        get("smt")(2, Setting({"linear": ["0"]}, backward=backward)).prepare(model, given)
    assert type(model[0]) is nn.Linear
