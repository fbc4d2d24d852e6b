"""GaLore: the projection, the steps by the paper's Algorithm 2 in float64, and what a step with a projection holds."""

import pytest
import torch
from torch import nn

from baselines.galore import GaLore, GaLoreAdam, leading_directions
from baselines.method import Setting
from baselines.registry import get
from benchmarks.harness.memory import Tracker
from benchmarks.harness.protocol import track
from benchmarks.harness.spec import RunSpec

# D_out, D_in, rank.
SHAPES = [(5, 11, 3), (11, 5, 3), (6, 6, 2), (1, 4, 1), (7, 3, 3)]


def gradients(d_out, d_in, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    while True:
        yield torch.randn(d_out, d_in, generator=generator, dtype=torch.float64).to(dtype)


def singular_vectors(gradient, rank):
    """Of the smaller side (D_out where both are equal), by falling value."""
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    return left[:, :rank] if gradient.shape[0] <= gradient.shape[1] else right.T[:, :rank]


@pytest.mark.parametrize(("d_out", "d_in", "rank"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_directions_are_the_singular_vectors(d_out, d_in, rank, dtype):
    gradient = next(gradients(d_out, d_in, dtype))
    found = leading_directions(gradient, rank)
    assert (found.shape, found.dtype) == ((min(d_out, d_in), rank), dtype)
    assert found.untyped_storage().nbytes() == found.numel() * found.element_size()
    expected = singular_vectors(gradient.double(), rank)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    # Up to their signs.
    assert ((found.double().T @ expected).diagonal().abs() - 1).abs().max() < tolerance
    assert (found.double().T @ found.double() - torch.eye(rank)).abs().max() < tolerance


def test_a_gradient_that_is_not_finite_has_no_directions():
    gradient = torch.ones(3, 4)
    gradient[1, 2] = torch.inf
    assert leading_directions(gradient, 2).isnan().all()


@pytest.mark.parametrize(("d_out", "d_in", "rank"), SHAPES)
def test_steps_are_the_papers(d_out, d_in, rank):
    lr, gap, alpha, steps = 0.01, 3, 0.25, 8
    weight = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameter = nn.Parameter(weight.clone())
    optimizer = GaLoreAdam([parameter], lr, rank, gap)
    left = d_out <= d_in
    m = v = 0.0
    refreshed = []
    for t, gradient in zip(range(1, steps + 1), gradients(d_out, d_in), strict=False):
        parameter.grad = gradient.clone()
        before = optimizer.state[parameter].get("projection")
        optimizer.step()
        state = optimizer.state[parameter]
        if state["projection"] is not before:
            refreshed.append(t)
            P = singular_vectors(gradient, rank)
            # LAPACK's signs are arbitrary, and moments of before are kept: the reference takes the same ones.
            P = P * (P * state["projection"]).sum(0).sign()
        R = P.T @ gradient if left else gradient @ P
        m, v = 0.9 * m + 0.1 * R, 0.999 * v + 0.001 * R**2
        N = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        weight = weight - lr * alpha * (P @ N if left else N @ P.T)
        torch.testing.assert_close(parameter.detach(), weight, rtol=1e-8, atol=1e-10)
    assert refreshed == [1, 4, 7]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == R.shape
    assert R.numel() == rank * max(d_out, d_in)


@pytest.mark.parametrize("bias", [True, False])
def test_the_method_steps_targets_so_and_all_else_by_adamw(bias):
    torch.manual_seed(0)
    d_in, d_out, rank, lr = 5, 9, 2, 0.01
    model = nn.Sequential(nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64), nn.LayerNorm(d_out).double())
    twin = nn.Parameter(model[0].weight.detach().clone())
    method = get("galore")(rank, Setting({"linear": ["0"]}))
    method.prepare(model, iter(()))
    own, rest = method.optimizers(model, lr)
    assert [id(p) for group in own.param_groups for p in group["params"]] == [id(model[0].weight)]
    assert isinstance(rest, torch.optim.AdamW)
    reference = GaLoreAdam([twin], lr, rank)
    x = torch.randn(6, d_in, dtype=torch.float64)
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        model(x).square().sum().backward()
        twin.grad = model[0].weight.grad.clone()
        own.step()
        rest.step()
        reference.step()
    torch.testing.assert_close(model[0].weight.detach(), twin.detach())
    assert torch.equal(method.export(model)[0].weight, model[0].weight)


def test_a_conv1d_steps_as_the_linear_layer_it_is():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(5, 9).double()), nn.Sequential(conv1d(9, 5).double())]
    models[1][0].weight.data.copy_(models[0][0].weight.T)
    models[1][0].bias.data.copy_(models[0][0].bias)
    x = torch.randn(6, 5, dtype=torch.float64)
    for model in models:
        method = get("galore")(2, Setting({"linear": ["0"]}))
        method.prepare(model, iter(()))
        optimizers = method.optimizers(model, 0.01)
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            model(x).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
        method.export(model)
    assert type(models[1][0]) is conv1d
    torch.testing.assert_close(models[1][0].weight.T, models[0][0].weight)


def born_in_a_step(optimizer, parameter):
    parameter.grad = next(gradients(*parameter.shape, torch.float32))
    tracker = Tracker()
    tracker.adopt([parameter, parameter.grad])
    tracker.see([*optimizer.state[parameter].values()])
    start = tracker.position
    with tracker:
        optimizer.step()
    return tracker.peak_of_born(start)


def test_what_a_step_holds_with_a_new_projection_and_without():
    m, n, r = 40, 64, 3
    parameter = nn.Parameter(torch.zeros(m, n))
    optimizer = GaLoreAdam([parameter], 1e-3, r)
    born_in_a_step(optimizer, parameter)
    # The projected gradient, which becomes the step; nothing of the weight's size.
    assert born_in_a_step(optimizer, parameter) == 4 * r * n
    optimizer.refresh()
    # The Gram matrix, in whose place its eigenvectors come; then the leading ones of them in their order.
    assert born_in_a_step(optimizer, parameter) == 4 * (m * m + r * m)
    assert born_in_a_step(optimizer, parameter) == 4 * r * n


def test_the_peak_of_a_measured_period_is_that_of_a_new_projection():
    d_in, d_out, tokens, r = 37, 53, 33, 3
    spec = RunSpec("galore", budget=r, layer=(d_in, d_out), batch=3, seq=11, rounds=0)
    peaks = track(spec, spec.workload(), Tracker()).peaks()
    weights = 4 * (d_out * d_in + d_out)
    # The projection and two moments; the bias's moments and AdamW's step counter.
    resident = weights + 4 * r * (d_in + 2 * d_out) + 2 * 4 * d_out + 4
    assert peaks["resident_bytes"] == resident
    held = resident + 4 * tokens * (d_in + 2 * d_out) + weights  # X, Y, dL/dY and the gradients
    assert peaks["peak_optimizer_bytes"] == held + 4 * (d_in**2 + r * d_in)


def test_a_measured_period_is_a_step_of_each_kind(monkeypatch):
    monkeypatch.setattr(GaLore, "gap", 5)
    model = nn.Sequential(nn.Linear(4, 6))
    method = get("galore")(2, Setting({"linear": ["0"]}))
    method.prepare(model, iter(()))
    optimizers = method.optimizers(model, 1e-3)
    found = []

    def step():
        model.zero_grad(set_to_none=True)
        model(torch.randn(3, 4)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        projection = optimizers[0].state[model[0].weight]["projection"]
        found.append(not any(projection is seen for seen in kept))
        kept.append(projection)

    kept = []
    for _ in range(3):
        step()
    for _ in range(2):
        method.begin_period(optimizers)
        for _ in range(method.period):
            step()
    for _ in range(5):
        step()
    assert found == [True, False, False] + [True, False] * 2 + [False] * 3 + [True, False]
    assert method.step_shares() == (1 / 5, 4 / 5)


def test_a_scheduled_rate_counts():
    parameter = nn.Parameter(torch.zeros(4, 6))
    optimizer = GaLoreAdam([parameter], 1.0, 2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 0 else 1.0)
    stream = gradients(4, 6, torch.float32)
    parameter.grad = next(stream)
    optimizer.step()
    assert not parameter.any()
    schedule.step()
    optimizer.step()
    assert parameter.detach().all()
