"""Gradient-Mask Tuning: which entries of a gradient stay, and AdamW's steps on what is left."""

import pytest
import torch
from torch import nn

from baselines.gmt import keep_largest_
from baselines.method import Setting
from baselines.registry import get
from sparsegrad.adapted import adapted_layers

# D_out, D_in, k. Magnitudes are looked at in blocks of an eighth of the D_out rows, rounded up.
MASKS = [(19, 13, 30), (19, 13, 1), (16, 24, 383), (1, 7, 3), (5, 1, 2), (9, 4, 36)]


def masked(gradient, k):
    """By a full sort of the magnitudes, which are distinct."""
    smallest_kept = gradient.abs().flatten().sort(descending=True).values[k - 1]
    return torch.where(gradient.abs() >= smallest_kept, gradient, 0.0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("d_out", "d_in", "k"), MASKS)
def test_the_largest_entries_stay(d_out, d_in, k, transposed):
    torch.manual_seed(d_out)
    gradient = torch.randn(d_in, d_out).T if transposed else torch.randn(d_out, d_in)
    expected = masked(gradient, k)
    assert keep_largest_(gradient, k) is gradient
    assert torch.equal(gradient, expected)


def test_exactly_k_stay_where_magnitudes_are_equal():
    gradient = torch.tensor([1.0, -1.0], dtype=torch.bfloat16).repeat(20, 5)
    before = gradient.clone()
    keep_largest_(gradient, 7)
    assert int(gradient.count_nonzero()) == 7
    assert torch.equal(gradient[gradient != 0], before[gradient != 0])


def batches(d_in, d_out, tokens=6):
    generator = torch.Generator().manual_seed(1)
    while True:
        sides = (d_in, d_out)
        yield [torch.randn(tokens, side, generator=generator, dtype=torch.float64) for side in sides]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer_type", ["Linear", "Conv1D"])
def test_steps_are_adams_on_the_masked_gradient(layer_type, bias):
    torch.manual_seed(0)
    d_in, d_out, k, lr, steps = 5, 11, 8, 0.01, 4
    if layer_type == "Linear":
        linear = nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64)
        weight = linear.weight.detach().clone()
    else:
        linear = pytest.importorskip("transformers.pytorch_utils").Conv1D(d_out, d_in).double()
        weight = linear.weight.detach().T.clone()
    model = nn.Sequential(linear)
    method = get("gmt")(k, Setting({"linear": ["0"]}))
    method.prepare(model, iter(()))
    optimizers = method.optimizers(model, lr)
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    moved = []
    for t, (x, dy) in zip(range(1, steps + 1), batches(d_in, d_out), strict=False):
        model.zero_grad(set_to_none=True)
        model(x).backward(dy)
        method.after_backward(model)
        assert int(model[0].weight.grad.count_nonzero()) == k
        if model[0].bias is not None:
            torch.testing.assert_close(model[0].bias.grad, dy.sum(0))
        for optimizer in optimizers:
            optimizer.step()
        g = masked(dy.T @ x, k)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        change = lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        weight = weight - change
        moved.append(int(change.count_nonzero()))
        torch.testing.assert_close(model[0].weight.detach(), weight, rtol=1e-10, atol=1e-12)
    # What is masked now and was not before goes on moving.
    assert moved[0] == k < moved[1]
    exported = method.export(model)[0]
    assert type(exported) is type(linear)
    torch.testing.assert_close(exported.weight.T if layer_type == "Conv1D" else exported.weight.data, weight)


def test_what_is_no_target_is_not_masked(build_model, batches):
    model = build_model("bert")
    method = get("gmt")(3, Setting({"up": ["bert.encoder.layer.0.intermediate.dense"]}))
    method.prepare(model, iter(()))
    model(**next(batches(model))).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    method.after_backward(model)
    (target,) = (f"{name}.weight" for name, _ in adapted_layers(model))
    for name, parameter in model.named_parameters():
        if name == target:
            assert int(parameter.grad.count_nonzero()) == 3
        else:
            assert torch.equal(parameter.grad, before[name])
