"""APOLLO: the steps by the paper's Algorithm 1 in float64, the projections, the limiter, and what a step holds."""

import itertools

import pytest
import torch
from torch import nn

from baselines.apollo import SEED_OFFSET, APOLLOAdam, projection
from baselines.method import Setting
from baselines.registry import get
from benchmarks.harness.memory import Tracker

# D_out, D_in, rank.
SHAPES = [(5, 11, 3), (11, 5, 3), (6, 6, 2), (1, 4, 1), (7, 3, 3)]


def gradients(d_out, d_in, scales=(1.0,), dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    for scale in itertools.cycle(scales):
        yield scale * torch.randn(d_out, d_in, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 3.0, 0.1, 0.1)], ids=["even", "jumps"])
@pytest.mark.parametrize(("d_out", "d_in", "rank"), SHAPES)
def test_steps_are_the_papers(d_out, d_in, rank, scales):
    lr, gap, seed, steps = 0.01, 3, 17, 8
    weight = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameter = nn.Parameter(weight.clone())
    optimizer = APOLLOAdam([parameter], lr, rank, gap, seed=seed)
    left = d_out <= d_in
    m = v = 0.0
    last, limited = None, []
    for t, gradient in zip(range(1, steps + 1), gradients(d_out, d_in, scales), strict=False):
        parameter.grad = gradient.clone()
        optimizer.step()
        # Equal numbers of both orientations: the smaller side m, the larger one n, channels along n.
        G = gradient if left else gradient.T
        drawn = torch.randn(
            (rank, d_out) if left else (d_in, rank),
            generator=torch.Generator().manual_seed(seed + (t - 1) // gap),
            dtype=torch.float64,
        )
        P = (drawn if left else drawn.T) / rank**0.5
        R = P @ G
        m, v = 0.9 * m + 0.1 * R, 0.999 * v + 0.001 * R**2
        scaled = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        update = G @ torch.diag(scaled.norm(dim=0) / R.norm(dim=0))
        limited.append(last is not None and bool(update.norm() / last > 1.01))
        if limited[-1]:
            update = update / update.norm() * 1.01 * last
        last = update.norm()
        weight = weight - lr * (update if left else update.T)
        torch.testing.assert_close(parameter.detach(), weight, rtol=1e-9, atol=1e-11)
    if len(scales) > 1:
        assert True in limited
        assert False in limited[1:]


def moves(gamma):
    """Norms of the updates by G, -G, G and G: the second nearly cancels the first moment, the third does not."""
    parameter = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    optimizer = APOLLOAdam([parameter], 1.0, 2, gamma=gamma)
    gradient = next(gradients(4, 6))
    found = []
    for sign in (1, -1, 1, 1):
        before = parameter.detach().clone()
        parameter.grad = sign * gradient
        optimizer.step()
        found.append((parameter.detach() - before).norm().item())
    return found


def test_a_jump_is_limited_to_gamma_times_the_update_before():
    free, limited = moves(gamma=1e9), moves(gamma=1.01)
    assert limited[:2] == free[:2]
    assert free[2] > 6 * free[1]
    assert limited[2:] == pytest.approx([1.01 * free[1], 1.01**2 * free[1]], rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_has_no_gradient_does_not_move_and_holds_nothing_up(dtype):
    parameter = nn.Parameter(torch.zeros(4, 6, dtype=dtype))
    optimizer = APOLLOAdam([parameter], 0.1, 2)
    # Nothing at all first: an update of norm zero does not bind the next to zero.
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert not parameter.any()
    moved = next(gradients(4, 6, dtype=dtype))
    parameter.grad = moved.clone()
    optimizer.step()
    assert parameter.detach().all()
    before = parameter.detach().clone()
    moved[:, 2] = 0.0
    parameter.grad = moved
    optimizer.step()
    assert torch.equal(parameter.detach()[:, 2], before[:, 2])
    assert (parameter.detach() != before).any(0).tolist() == [True, True, False, True, True, True]


def test_projections_are_the_seeds_and_normal():
    state = torch.get_rng_state()
    like = torch.empty(0, dtype=torch.float64)
    P = projection((4, 5000), 3, like)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(P, projection((4, 5000), 3, like))
    assert not torch.equal(P, projection((4, 5000), 4, like))
    # 20 000 entries of variance 1/4: the mean is off by 0.0035, the variance by 1 % of it.
    assert abs(P.mean()) < 5 * 0.0035
    assert abs(P.var() / 0.25 - 1) < 5 * 0.01
    assert projection((5000, 4), 3, like).var() == pytest.approx(0.25, rel=0.05)


def test_every_weight_and_seed_has_its_own_projections():
    parameters = [nn.Parameter(torch.zeros(3, 4)) for _ in range(3)]
    method = get("apollo")(2, Setting({}, seed=5))
    optimizer = method.weight_optimizer(parameters, 1e-3)
    seeds = [optimizer.state[parameter]["seed"] for parameter in parameters]
    assert seeds[0] == 5 + SEED_OFFSET
    # No weight runs into the next one's seeds, which rise by one every gap.
    assert min(b - a for a, b in itertools.pairwise(seeds)) > 10**9


@pytest.mark.parametrize("layer_type", ["Linear", "Conv1D"])
def test_the_method_steps_targets_so_and_all_else_by_adamw(layer_type):
    torch.manual_seed(0)
    if layer_type == "Linear":
        linear = nn.Linear(5, 9, dtype=torch.float64)
        weight = linear.weight.detach().clone()
    else:
        linear = pytest.importorskip("transformers.pytorch_utils").Conv1D(9, 5).double()
        weight = linear.weight.detach().T.clone()
    model = nn.Sequential(linear)
    twin = nn.Parameter(weight)
    method = get("apollo")(2, Setting({"linear": ["0"]}))
    method.prepare(model, iter(()))
    own, rest = method.optimizers(model, 0.01)
    assert [id(p) for group in rest.param_groups for p in group["params"]] == [id(model[0].bias)]
    assert isinstance(rest, torch.optim.AdamW)
    reference = APOLLOAdam([twin], 0.01, 2, seed=SEED_OFFSET)
    x = torch.randn(6, 5, dtype=torch.float64)
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        model(x).square().sum().backward()
        twin.grad = model[0].weight.grad.clone()
        own.step()
        rest.step()
        reference.step()
    exported = method.export(model)[0]
    assert type(exported) is type(linear)
    found = exported.weight.T if layer_type == "Conv1D" else exported.weight
    torch.testing.assert_close(found.detach(), twin.detach())


def test_a_step_holds_the_projection_and_what_is_projected_alone():
    m, n, r = 40, 64, 3
    parameter = nn.Parameter(torch.zeros(m, n))
    optimizer = APOLLOAdam([parameter], 1e-3, r)
    stream = gradients(m, n, dtype=torch.float32)
    for _ in range(2):
        parameter.grad = next(stream)
        tracker = Tracker()
        tracker.adopt([parameter, parameter.grad])
        tracker.see([value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)])
        start = tracker.position
        with tracker:
            optimizer.step()
    # P and R; then R, written over by Adam's step, with vectors of n: no tensor of the weight's size.
    assert 4 * r * (m + n) <= tracker.peak_of_born(start) <= 4 * (r * n + max(r * m, 4 * n))
    tensors = {name for name, value in optimizer.state[parameter].items() if isinstance(value, torch.Tensor)}
    assert tensors == {"exp_avg", "exp_avg_sq", "norm"}
