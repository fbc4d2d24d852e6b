"""LoRA against its closed form in float64 and against peft's."""

import copy

import pytest
import torch
from torch import nn

from baselines.lora import LoRAFunction, LoRALinear
from sparsegrad.adapted import adapted_layers

# T, D_in, D_out, r
SHAPES = [(7, 5, 11, 3), (1, 13, 2, 1), (6, 3, 3, 3), (4, 8, 5, 2)]
FLOAT64 = {"rtol": 1e-12, "atol": 1e-13}


def linear(d_in, d_out, bias=True, transposed=False, dtype=torch.float64):
    """nn.Linear or transformers' Conv1D (which always has a bias), random."""
    if transposed:
        layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(d_out, d_in)
    else:
        layer = nn.Linear(d_in, d_out, bias=bias)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.to(dtype)


def weight_of(layer, transposed):
    return layer.weight.detach().T.clone() if transposed else layer.weight.detach().clone()


def adapt(layer, rank, alpha, dtype=None):
    """A LoRALinear whose B is not zero."""
    adapted = LoRALinear(layer, rank, alpha, dtype)
    nn.init.normal_(adapted.lora_B)
    return adapted


@pytest.mark.parametrize(("bias", "transposed"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize(("tokens", "d_in", "d_out", "rank"), SHAPES)
def test_closed_form(tokens, d_in, d_out, rank, bias, transposed):
    torch.manual_seed(tokens)
    source = linear(d_in, d_out, bias, transposed)
    W, b = weight_of(source, transposed), source.bias
    alpha = 5
    s = alpha / rank
    layer = adapt(source, rank, alpha)
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    x = torch.randn(tokens, d_in, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(tokens, d_out, dtype=torch.float64)
    y = layer(x)
    y.backward(dy)

    X = x.detach()
    expected = X @ W.T + s * X @ A.T @ B.T
    if bias:
        expected = expected + b.detach()
        torch.testing.assert_close(layer.bias.grad, dy.sum(0), **FLOAT64)
    torch.testing.assert_close(y.detach(), expected, **FLOAT64)
    torch.testing.assert_close(layer.lora_A.grad, s * B.T @ dy.T @ X, **FLOAT64)
    torch.testing.assert_close(layer.lora_B.grad, s * dy.T @ X @ A.T, **FLOAT64)
    torch.testing.assert_close(x.grad, dy @ W + s * dy @ B @ A, **FLOAT64)
    torch.testing.assert_close(layer.effective_weight(), W + s * B @ A, **FLOAT64)
    assert layer.weight.grad is None


@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (2, 1, 3), ()])
def test_leading_dimensions_are_kept(shape):
    torch.manual_seed(0)
    layer = adapt(linear(5, 7), 2, 3)
    x = torch.randn(*shape, 5, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (*shape, 7)
    torch.testing.assert_close(y, x @ layer.effective_weight().T + layer.bias, **FLOAT64)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias):
    torch.manual_seed(1)

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    inputs = (leaf(4, 5), leaf(3, 5), leaf(3) if bias else None, leaf(2, 5), leaf(3, 2), 0.75)
    assert torch.autograd.gradcheck(LoRAFunction.apply, inputs)


@pytest.mark.parametrize(("rank", "alpha", "scaling"), [(7, 14, 2.0), (4, 1, 0.25), (3, 3, 1.0)])
def test_scaling_is_alpha_over_r(rank, alpha, scaling):
    layer = adapt(linear(9, 8), rank, alpha)
    x = torch.randn(3, 9, dtype=torch.float64)
    update = layer(x) - (x @ layer.weight.T + layer.bias)
    torch.testing.assert_close(update, scaling * (x @ layer.lora_A.T) @ layer.lora_B.T, rtol=1e-10, atol=1e-12)


def test_initialisation_is_kaiming_and_zero():
    # Kaiming uniform with a = sqrt(5): the bound is sqrt(6 / ((1 + 5) D_in)) = 1 / sqrt(D_in).
    torch.manual_seed(0)
    d_in = 400
    layer = LoRALinear(linear(d_in, 6, dtype=torch.float32), 50, 1)
    bound = d_in**-0.5
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.abs().max() > 0.99 * bound
    # The standard deviation of a uniform distribution on (-bound, bound), and its error over 20 000 draws.
    assert float(layer.lora_A.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not layer.lora_B.any()


def test_weight_and_bias_are_the_sources_own():
    for transposed in (False, True):
        source = linear(5, 7, transposed=transposed)
        layer = LoRALinear(source, 2, 4)
        assert layer.weight.data_ptr() == source.weight.data_ptr()
        assert layer.bias is source.bias


# --- the method


def own(model):
    return [(layer.lora_A, layer.lora_B) for _, layer in adapted_layers(model)]


def test_alpha_is_twice_the_rank(build_model, apply):
    model = build_model("bert")
    apply("lora", model, budget=5)
    for _, layer in adapted_layers(model):
        assert (layer.rank, layer.scaling) == (5, 2.0)


def test_adapters_come_from_the_seed_and_leave_the_global_one_alone(build_model, apply):
    models = [build_model("bert") for _ in range(3)]
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    for model, seed in zip(models, (3, 3, 4), strict=True):
        apply("lora", model, budget=2, seed=seed)
    assert torch.equal(torch.rand(3), expected)
    first, same, other = ([A for A, _ in own(model)] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[1])


def test_adapters_are_not_the_weights_own_rows(apply):
    # nn.Linear draws its weight as LoRA draws A: a model made under the same seed must not share the draw.
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 6))
    apply("lora", model, budget=2, seed=3, layers={"linear": ["0"]})
    assert not torch.equal(model[0].lora_A, model[0].weight[:2])


def relative(value, expected):
    return float((value.detach().double() - expected).norm() / expected.norm())


def test_float32_adapters_of_a_bfloat16_model(build_model, apply, train):
    model = build_model("bert", torch.bfloat16)
    method = apply("lora", model, budget=3, adapter_dtype="float32")
    before = [A.detach().clone() for A, _ in own(model)]
    for _, B in own(model):
        nn.init.normal_(B, std=0.1)
    # Less than half of a bfloat16 step (2^-8 of the value) for almost every entry: in bfloat16 nothing would move.
    train(method, model, count=1, lr=1e-6)
    for (A, B), old in zip(own(model), before, strict=True):
        assert A.dtype == B.dtype == torch.float32
        assert A.grad.dtype == B.grad.dtype == torch.float32
        assert (A.detach() != old).all()
    rest = [p for name, p in model.named_parameters() if "lora_" not in name]
    assert all(p.dtype == torch.bfloat16 for p in rest)
    assert all(p.grad.dtype == torch.bfloat16 for p in rest if p.grad is not None)


def test_adapters_have_the_models_dtype_unless_asked(build_model, apply):
    for dtype in (torch.bfloat16, torch.float64):
        model = build_model("bert", dtype)
        apply("lora", model, budget=3)
        assert {p.dtype for pair in own(model) for p in pair} == {dtype}


def test_float32_adapters_compute_what_bfloat16_can_hold():
    torch.manual_seed(2)
    tokens, d_in, d_out, rank, s = 9, 16, 8, 3, 2.0
    layer = adapt(linear(d_in, d_out, dtype=torch.bfloat16), rank, s * rank, torch.float32)
    x = torch.randn(tokens, d_in, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(tokens, d_out, dtype=torch.bfloat16)
    y = layer(x)
    y.backward(dy)
    X, DY, W, A, B = (t.detach().double() for t in (x, dy, layer.weight, layer.lora_A, layer.lora_B))
    # Each of at most five roundings to bfloat16 (A or B, X A^T, its product, the sum, the scaling) is off by 2^-9.
    error = 5 * 2**-9
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert relative(y, X @ W.T + layer.bias.detach().double() + s * X @ A.T @ B.T) < error
    assert relative(x.grad, DY @ W + s * DY @ B @ A) < error
    assert relative(layer.lora_A.grad, s * B.T @ DY.T @ X) < error
    assert relative(layer.lora_B.grad, s * DY.T @ X @ A.T) < error


# --- peft


def peft_linear(layer, rank, alpha, transposed):
    """peft's LoRA on the layer, B not zero, and the model it is in."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=["0"], fan_in_fan_out=transposed, lora_dropout=0.0, bias="lora_only"
    )
    model = peft.get_peft_model(nn.Sequential(layer), config)
    wrapped = model.base_model.model[0]
    nn.init.normal_(wrapped.lora_B["default"].weight)
    return model, wrapped


@pytest.mark.parametrize(("bias", "transposed"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize(("tokens", "d_in", "d_out", "rank"), SHAPES)
def test_equals_peft_on_a_layer(tokens, d_in, d_out, rank, bias, transposed):
    torch.manual_seed(4)
    source = linear(d_in, d_out, bias, transposed)
    alpha = 3
    model, theirs = peft_linear(copy.deepcopy(source), rank, alpha, transposed)
    ours = LoRALinear(source, rank, alpha)
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    with torch.no_grad():
        ours.lora_A.copy_(A)
        ours.lora_B.copy_(B)
    x = torch.randn(tokens, d_in, dtype=torch.float64, requires_grad=True)
    x_theirs = x.detach().clone().requires_grad_()
    dy = torch.randn(tokens, d_out, dtype=torch.float64)
    y, y_theirs = ours(x), model(x_theirs)
    torch.testing.assert_close(y, y_theirs, **FLOAT64)
    y.backward(dy)
    y_theirs.backward(dy)
    torch.testing.assert_close(x.grad, x_theirs.grad, **FLOAT64)
    torch.testing.assert_close(ours.lora_A.grad, A.grad, **FLOAT64)
    torch.testing.assert_close(ours.lora_B.grad, B.grad, **FLOAT64)
    if bias:
        torch.testing.assert_close(ours.bias.grad, theirs.base_layer.bias.grad, **FLOAT64)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == model.get_nb_trainable_parameters()[0]
    model.merge_and_unload()
    merged = model.base_model.model[0]
    plain = ours.to_linear()
    assert type(plain) is type(merged)
    torch.testing.assert_close(plain.weight, merged.weight, **FLOAT64)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_equals_peft_on_a_model(family, build_model, batches, apply):
    peft = pytest.importorskip("peft")
    rank = 3
    ours = build_model(family, torch.float64)
    method = apply("lora", ours, budget=rank, train_rest="none")
    names = [name for name, _ in adapted_layers(ours)]
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=names, fan_in_fan_out=family == "gpt2", lora_dropout=0.0
    )
    theirs = peft.get_peft_model(build_model(family, torch.float64), config)
    wrapped = {name: theirs.base_model.model.get_submodule(name) for name in names}

    added = sum(A.numel() + B.numel() for A, B in own(ours))
    assert added == theirs.get_nb_trainable_parameters()[0]
    shapes = [layer.weight.shape for _, layer in adapted_layers(ours)]
    assert added == method.budget_params(shapes)

    with torch.no_grad():
        for name, layer in adapted_layers(ours):
            nn.init.normal_(wrapped[name].lora_B["default"].weight, std=0.2)
            layer.lora_A.copy_(wrapped[name].lora_A["default"].weight)
            layer.lora_B.copy_(wrapped[name].lora_B["default"].weight)
    # The first embeddings have a gradient that went through every layer.
    embeddings = [model.get_input_embeddings().weight.requires_grad_() for model in (ours, theirs)]
    batch = next(batches(ours))
    result, expected = ours(**batch), theirs(**batch)
    torch.testing.assert_close(result.logits, expected.logits, **FLOAT64)
    result.loss.backward()
    expected.loss.backward()
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(embeddings[0].grad, embeddings[1].grad, **close)
    for name, layer in adapted_layers(ours):
        torch.testing.assert_close(layer.lora_A.grad, wrapped[name].lora_A["default"].weight.grad, **close)
        torch.testing.assert_close(layer.lora_B.grad, wrapped[name].lora_B["default"].weight.grad, **close)
    exported, merged = method.export(ours), theirs.merge_and_unload()
    for name in names:
        torch.testing.assert_close(
            exported.get_submodule(name).weight, merged.get_submodule(name).weight, rtol=1e-12, atol=1e-13
        )
