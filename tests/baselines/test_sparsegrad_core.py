"""The core as a method: which budgets it reads, what it makes of them, and that it trains nothing else."""

import pytest
import torch

from baselines.method import MethodError, Setting, target_shapes
from baselines.registry import get, parse
from sparsegrad import CoreLinear, calibrate, core_shape, find_layers
from sparsegrad.adapted import adapted_layers

NAME = "sparsegrad-core"
SHAPES = [(24, 16), (16, 24), (5, 7)]


def bare(budget):
    return get(NAME)(budget, Setting(layers={}))


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("sparsegrad-core[3x5]", [(3, 5)] * 3),
        ("sparsegrad-core[0x5]", [(0, 5)] * 3),
        ("sparsegrad-core[12]", [core_shape(12, shape) for shape in SHAPES]),
        (
            "sparsegrad-core[0.1]",
            [core_shape(entries, shape) for entries, shape in zip((38, 38, 4), SHAPES, strict=True)],
        ),
        ("sparsegrad-core", [core_shape(entries, shape) for entries, shape in zip((4, 4, 1), SHAPES, strict=True)]),
    ],
)
def test_budgets(text, cores):
    ((name, budget),) = parse(text)
    assert name == NAME
    method = bare(budget)
    assert [method.core(shape) for shape in SHAPES] == cores
    held = sum((k_out or d_out) * k_in for (k_out, k_in), (d_out, _) in zip(cores, SHAPES, strict=True))
    assert method.budget_params(SHAPES) == held
    method.check_budget_fits(SHAPES)


@pytest.mark.parametrize("budget", ["3x0", "0x0", "7", "axb", "3x", "x3", "3x4x5"])
def test_what_is_no_core(budget):
    with pytest.raises(MethodError, match=rf"a core is k_out x k_in, .* got sparsegrad-core\[{budget}\]"):
        bare(budget)


@pytest.mark.parametrize("budget", ["6x5", "3x8", "0x8", "82x326"])
def test_a_core_must_fit_every_kind(budget):
    bare("5x7").check_budget_fits(SHAPES)
    with pytest.raises(MethodError) as error:
        bare(budget).check_budget_fits(SHAPES)
    expected = f"a core (k_out x k_in) must be at most 5x7 for these layers, got sparsegrad-core[{budget}]"
    assert str(error.value) == expected


def test_a_core_that_does_not_fit_changes_nothing(build_model):
    def unread():
        pytest.fail("no batch is drawn")
        yield

    model = build_model("bert")
    layers = find_layers(model)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(MethodError, match=r"at most 16x16 for these layers"):
        get(NAME)("17x3", Setting(layers=layers)).prepare(model, unread())
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_rows_that_are_not_rotated_match_twice_loras_rank():
    shapes = [(3072, 768), (768, 3072)]
    assert bare("0x14").budget_params(shapes) == get("lora")(7, Setting(layers={})).budget_params(shapes)


@pytest.mark.parametrize("budget", [30, "3x5", "0x5"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_each_kind_has_the_leading_directions_of_its_gradients(family, budget, build_model, batches, apply):
    model, twin = build_model(family, torch.float64), build_model(family, torch.float64)
    layers = find_layers(model)
    shapes = {kind: target_shapes(model, {kind: names})[0] for kind, names in layers.items()}
    method = apply(NAME, model, budget=budget, layers=layers)
    stream = batches(twin)
    complete = calibrate(twin, layers, [next(stream), next(stream)])
    for kind, names in layers.items():
        k_out, k_in = method.core(shapes[kind])
        basis = model.get_submodule(names[0]).basis
        assert all(model.get_submodule(name).basis is basis for name in names)
        torch.testing.assert_close(basis.U, complete[kind].U[:k_in], rtol=0, atol=1e-9)
        assert (basis.V is None) == (k_out == 0)
        if k_out:
            torch.testing.assert_close(basis.V, complete[kind].V[:k_out], rtol=0, atol=1e-9)
    bases = [model.get_submodule(names[0]).basis for names in layers.values()]
    expected = [id(tensor) for basis in bases for tensor in basis.buffers()]
    assert sorted(id(tensor) for tensor in method.basis_tensors(model)) == sorted(expected)


@pytest.mark.parametrize("rest", ["all", "none"])
def test_the_source_weights_never_move(rest, build_model, apply, train):
    model = build_model("bert")
    before = {
        name: model.get_submodule(name).weight.detach().clone() for n in find_layers(model).values() for name in n
    }
    method = apply(NAME, model, budget=12, train_rest=rest)
    train(method, model, count=3, lr=1e-2)
    for name, layer in adapted_layers(model):
        assert torch.equal(layer.weight, before[name])
        assert layer.weight.grad is None
        assert layer.core.detach().abs().min() > 0


@pytest.mark.parametrize("adapter_dtype", ["same", "float32"])
def test_the_cores_dtype_is_the_settings(adapter_dtype, build_model, apply):
    model = build_model("bert", torch.bfloat16)
    apply(NAME, model, budget=12, adapter_dtype=adapter_dtype)
    layers = [layer for layer in model.modules() if isinstance(layer, CoreLinear)]
    assert {layer.core.dtype for layer in layers} == {torch.bfloat16 if adapter_dtype == "same" else torch.float32}
    assert {layer.basis.U.dtype for layer in layers} == {torch.bfloat16}


def test_exactly_the_calibration_steps_are_drawn(build_model, batches):
    model = build_model("bert")
    drawn = []
    stream = (drawn.append(1) or batch for batch in batches(model))
    get(NAME)("2x3", Setting(layers=find_layers(model), calibration_steps=3)).prepare(model, stream)
    assert len(drawn) == 3
