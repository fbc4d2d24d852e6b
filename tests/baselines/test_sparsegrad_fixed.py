"""The fixed support as a method: which batches do what, what is kept, what trains."""

import pytest
import torch
from torch import nn

from baselines.method import Setting
from baselines.registry import get
from sparsegrad import SparseGradError, calibrate, choose_entries, find_layers, fixed_ranks
from sparsegrad.adapted import adapted_layers, weight_shape


def prepared(model, layers, drawn, steps, budget=5, **setting):
    method = get("sparsegrad-fixed")(budget, Setting(layers=layers, calibration_steps=steps, **setting))
    method.prepare(model, drawn)
    return method


@pytest.mark.parametrize(("steps", "for_bases", "for_entries"), [(1, 1, 1), (2, 1, 1), (3, 2, 1), (6, 4, 2), (8, 6, 2)])
def test_the_last_third_of_the_batches_chooses_the_entries(build_model, batches, steps, for_bases, for_entries):
    model, twin = build_model("bert"), build_model("bert")
    layers = find_layers(model)
    source = batches(model)
    drawn = [next(source) for _ in range(steps)]
    prepared(model, layers, iter(drawn), steps)
    # By the package's own steps, on the batches that the method says.
    shapes = {kind: weight_shape(twin.get_submodule(names[0])) for kind, names in layers.items()}
    bases = calibrate(
        twin, layers, drawn[:for_bases], ranks={kind: fixed_ranks(shapes[kind], nnz=5) for kind in layers}
    )
    chosen = choose_entries(twin, layers, bases, drawn[-for_entries:], nnz=5)
    for kind, names in layers.items():
        for name in names:
            layer = model.get_submodule(name)
            for found, expected in ((layer.basis.U, bases[kind].U), (layer.basis.V, bases[kind].V)):
                assert (found is None) == (expected is None)
                assert found is None or torch.equal(found, expected)
            assert torch.equal(layer.index, chosen[name])


def test_no_more_batches_are_drawn_than_asked_for(build_model, batches):
    model = build_model("bert")
    source = batches(model)
    drawn = iter([next(source) for _ in range(7)])
    prepared(model, find_layers(model), drawn, 5)
    assert len(list(drawn)) == 2


@pytest.mark.parametrize(("steps", "given"), [(1, 0), (2, 0), (2, 1), (3, 2)])
def test_too_few_batches(build_model, batches, steps, given):
    model = build_model("bert")
    source = batches(model)
    with pytest.raises(SparseGradError, match="at least one batch"):
        prepared(model, find_layers(model), [next(source) for _ in range(given)], steps)


def test_one_side_is_rotated_and_shared_by_the_layers_of_a_kind(build_model, apply):
    model = build_model("bert")  # up: 24 x 16, down: 16 x 24
    method = apply("sparsegrad-fixed", model, budget=5)
    layers = [layer for _, layer in adapted_layers(model)]
    found = list(method.basis_tensors(model))
    assert [tuple(tensor.shape) for tensor in found] == [(2, 16), (16, 16)] + [(5,)] * 4
    up, down = (layers[i] for i in (0, 1))
    assert found[0] is up.basis.U is layers[2].basis.U
    assert found[1] is down.basis.V is layers[3].basis.V
    assert up.basis.V is down.basis.U is None
    assert all(a is layer.index for a, layer in zip(found[2:], layers, strict=True))
    assert all(tensor.dtype == torch.int32 for tensor in found[2:])


@pytest.mark.parametrize("rest", ["all", "none"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_only_k_entries_in_the_basis_ever_change(family, rest, build_model, apply, train):
    model = build_model(family, torch.float64)
    layers = find_layers(model)
    apply("sparsegrad-fixed", model, budget=7, train_rest=rest)
    names = [name for of_kind in layers.values() for name in of_kind]
    before = {name: model.get_submodule(name).effective_weight().clone() for name in names}
    method = get("sparsegrad-fixed")(7, Setting(layers=layers, train_rest=rest))
    train(method, model, count=3, lr=1e-2)
    for name in names:
        layer = model.get_submodule(name)
        change = layer.effective_weight() - before[name]
        U, V = layer.basis.U, layer.basis.V
        change = change @ U.T if V is None else V @ change
        assert torch.equal((change.abs() > 1e-9).flatten().nonzero().squeeze(1), layer.index.long())
        assert layer.index.numel() == 7


def test_the_values_keep_what_bfloat16_would_round_away(build_model, apply, train):
    model = build_model("bert", torch.bfloat16)
    method = apply("sparsegrad-fixed", model, budget=7, adapter_dtype="float32")
    layers = [layer for _, layer in adapted_layers(model)]
    before = [layer.values.detach().clone() for layer in layers]
    # Adam's first step is lr for every entry: far below a bfloat16 step of the largest entries.
    train(method, model, count=1, lr=1e-6)
    for layer, old in zip(layers, before, strict=True):
        assert layer.values.dtype == layer.values.grad.dtype == torch.float32
        assert layer.weight.dtype == torch.bfloat16
        assert (layer.values != old).all()


def test_a_model_that_is_one_kind_of_square_layers(apply):
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    method = get("sparsegrad-fixed")(
        0.25,
        Setting({"linear": ["0", "2"]}, calibration_steps=2, backward=lambda m, x: m(x).square().sum().backward()),
    )
    x = torch.randn(5, 6, dtype=torch.float64)
    before = model(x).detach()
    method.prepare(model, iter([x, x + 1]))
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    # 9 entries; ceil(4 * 9 / 6) directions.
    assert [(layer.values.numel(), layer.basis.U.shape) for _, layer in adapted_layers(model)] == [(9, (6, 6))] * 2
