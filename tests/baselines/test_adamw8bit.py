"""AdamW with 8-bit moments: its steps and its storage by the definition, its bytes, and bitsandbytes where it is."""

import copy
import math

import pytest
import torch
from torch import nn

from baselines import adamw8bit
from baselines.adamw8bit import BLOCK, SMALLEST, AdamW8bit
from baselines.dynamic8 import dynamic_table, middles
from baselines.method import MethodError, Setting
from baselines.registry import get
from benchmarks.harness.memory import Tracker
from sparsegrad.errors import SparseGradError

LR, BETAS, EPS = 1e-2, (0.9, 0.999), 1e-8
TABLES = {"exp_avg": dynamic_table(), "exp_avg_sq": dynamic_table(signed=False)}
# Whole blocks, a last block that is not whole, and one entry more than the smallest that has codes.
SHAPES = [(64, 96), (70, 100), (SMALLEST + 1,)]


def made(shape, dtype=torch.float32, seed=0):
    """A parameter, and gradients of very different sizes, some of them zero."""
    source = torch.Generator().manual_seed(seed)
    parameter = nn.Parameter(torch.randn(shape, generator=source).to(dtype))
    sizes = 10.0 ** torch.randint(-4, 2, (shape[0], *[1] * (len(shape) - 1)), generator=source)

    def gradient():
        drawn = torch.randn(shape, generator=source) * sizes
        return drawn.masked_fill_(torch.rand(shape, generator=source) < 0.05, 0).to(dtype)

    return parameter, gradient


def moments(state):
    """Both moments that a state stores, by the definition: (n,) float64 each."""
    found = {}
    for name, table in TABLES.items():
        largest = state[f"{name}_largest"].double().repeat_interleave(BLOCK)
        found[name] = table.double()[state[name].flatten().long()] * largest[: state[name].numel()]
    return found


def test_the_unsigned_table_has_a_bit_more_for_the_fraction():
    signed, unsigned = TABLES["exp_avg"], TABLES["exp_avg_sq"]
    assert unsigned.unique().numel() == 256
    assert (float(unsigned.min()), float(unsigned.max())) == (0.0, 1.0)
    for bits in range(7):
        power = 10.0 ** (bits - 6)
        inside = [table[(table > 0.1 * power) & (table < power)] for table in (signed, unsigned)]
        assert [values.numel() for values in inside] == [2**bits, 2 ** (bits + 1)]
        torch.testing.assert_close(inside[1].mean(), torch.tensor(0.55 * power), rtol=1e-5, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_middles_lead_to_the_nearest(signed):
    table = dynamic_table(signed)
    source = torch.Generator().manual_seed(1)
    scaled = torch.rand(3000, generator=source) ** 6 * (torch.randn(3000, generator=source).sign() if signed else 1)
    found = table.double()[torch.bucketize(scaled, middles(table))]
    least = (scaled.double()[:, None] - table.double()).abs().amin(-1)
    # Half way between two values the rounding of float32 decides.
    torch.testing.assert_close((scaled.double() - found).abs(), least, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_is_adams_with_the_moments_that_were_stored(shape, dtype, monkeypatch):
    """In float64, by the equations of Adam (Kingma and Ba, algorithm 1) and of the paper's section 2."""
    monkeypatch.setattr(adamw8bit, "PART", 2 * BLOCK)
    parameter, gradient = made(shape, dtype)
    optimizer = AdamW8bit([parameter], lr=LR, betas=BETAS, eps=EPS)
    m = v = torch.zeros(parameter.numel(), dtype=torch.float64)
    for step in range(1, 5):
        before = parameter.detach().clone().double().flatten()
        parameter.grad = gradient()
        g = parameter.grad.double().flatten()
        optimizer.step()
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * g**2
        expected = before - LR * (m / (1 - BETAS[0] ** step)) / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS)
        rtol = 2**-8 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(parameter.detach().double().flatten(), expected, rtol=rtol, atol=1e-6)

        state = optimizer.state[parameter]
        stored = moments(state)
        for name, exact in (("exp_avg", m), ("exp_avg_sq", v)):
            padded = torch.nn.functional.pad(exact, (0, -exact.numel() % BLOCK)).view(-1, BLOCK)
            largest = padded.abs().amax(1)
            torch.testing.assert_close(state[f"{name}_largest"].double(), largest, rtol=1e-5, atol=1e-12)
            scaled = (padded / largest[:, None].clamp_min(1e-300)).flatten()[: exact.numel()]
            least = (scaled[:, None] - TABLES[name].double()).abs().amin(-1)
            off = (stored[name] / largest.repeat_interleave(BLOCK)[: exact.numel()] - scaled).abs()
            assert float((off - least).max()) < 1e-5
        # The next step starts from what is stored.
        m, v = stored["exp_avg"], stored["exp_avg_sq"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_parameter_is_stepped_as_by_adamw(dtype):
    parameter, gradient = made((63, 65), dtype)
    assert parameter.numel() < SMALLEST
    exact = nn.Parameter(parameter.detach().float())
    own = AdamW8bit([parameter], lr=LR)
    torchs = torch.optim.AdamW([exact], lr=LR, weight_decay=0.0)
    for _ in range(5):
        parameter.grad = gradient()
        exact.grad = parameter.grad.float()
        own.step()
        torchs.step()
    rounding = 5 * 2**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(parameter.float(), exact, rtol=rounding, atol=rounding)
    state = own.state[parameter]
    assert {name: (state[name].dtype, state[name].shape) for name in ("exp_avg", "exp_avg_sq")} == dict.fromkeys(
        ("exp_avg", "exp_avg_sq"), (torch.float32, parameter.shape)
    )


def test_it_goes_where_adamw_goes():
    """Two hundred steps on a least-squares problem: eight bits cost little of the way down."""
    source = torch.Generator().manual_seed(3)
    x, target = torch.randn(256, 64, generator=source), torch.randn(256, 80, generator=source)
    losses = {}
    for kind in (AdamW8bit, lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0)):
        weight = nn.Parameter(torch.zeros(64, 80))
        optimizer = kind([weight], lr=1e-2)
        for _ in range(200):
            loss = (x @ weight - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[kind] = loss.item()
    eight, full = losses.values()
    floor = (x @ torch.linalg.lstsq(x, target).solution - target).square().mean().item()
    start = target.square().mean().item()
    assert eight - floor < 0.01 * (start - floor)
    assert full - floor < 0.01 * (start - floor)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_stores_two_bytes_an_entry_and_eight_a_block(shape):
    parameters = [made(shape, seed=seed)[0] for seed in range(2)]
    optimizer = AdamW8bit(parameters, lr=LR)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tracker = Tracker()
    tracker.adopt(optimizer)
    n = parameters[0].numel()
    # Both tables once, for all parameters.
    assert tracker.live_bytes == 2 * (2 * n + 2 * 4 * math.ceil(n / BLOCK)) + 2 * 4 * 256


def test_a_step_holds_no_more_than_a_part(monkeypatch):
    monkeypatch.setattr(adamw8bit, "PART", 4 * BLOCK)
    monkeypatch.setattr(adamw8bit, "PARTS", 32)
    parameter, gradient = made((64, 512))
    optimizer = AdamW8bit([parameter], lr=LR)
    parameter.grad = gradient()
    optimizer.step()
    tracker = Tracker()
    tracker.adopt(optimizer, parameter, parameter.grad)
    start, position = tracker.live_bytes, tracker.position
    with tracker:
        optimizer.step()
    assert tracker.live_bytes == start
    # Both moments of a part and the change, or what is made to store one of them; the tables' middles besides.
    assert tracker.peak(position).bytes - start <= 4 * 4 * 4 * BLOCK + 2 * 4 * 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["state dict", "copy"])
def test_a_saved_state_goes_on_alike(way, dtype):
    big, gradient = made((70, 100), dtype)
    small, of_small = made((5, 7), dtype, seed=4)
    one = AdamW8bit([big, small], lr=LR)
    for _ in range(3):
        big.grad, small.grad = gradient(), of_small()
        one.step()
    if way == "copy":
        two = copy.deepcopy(one)
        others = two.param_groups[0]["params"]
    else:
        others = [nn.Parameter(p.detach().clone()) for p in (big, small)]
        two = AdamW8bit(others, lr=1.0)
        two.load_state_dict(copy.deepcopy(one.state_dict()))
    for _ in range(2):
        big.grad, small.grad = gradient(), of_small()
        for other, parameter in zip(others, (big, small), strict=True):
            other.grad = parameter.grad.clone()
        one.step()
        two.step()
    for other, parameter in zip(others, (big, small), strict=True):
        assert torch.equal(other, parameter)
        same = two.state[other], one.state[parameter]
        assert same[0].keys() == same[1].keys()
        for name, value in same[1].items():
            assert torch.equal(same[0][name], value) if isinstance(value, torch.Tensor) else same[0][name] == value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0}, "lr must be positive, got 0"),
        ({"eps": 0}, "eps must be positive, got 0"),
        ({"betas": (0.9, 1)}, r"betas must be in \[0, 1\), got \(0.9, 1\)"),
    ],
)
def test_what_is_out_of_range_is_refused(options, message):
    with pytest.raises(SparseGradError, match=message):
        AdamW8bit([made((3, 5))[0]], **options)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda p: setattr(p, "grad", torch.ones(64, 96).to_sparse()), "needs dense gradients, got a torch.sparse_coo"),
        (lambda p: setattr(p, "data", torch.ones(96, 64).t()), r"needs contiguous parameters.*strides \(1, 64\)"),
    ],
)
def test_nothing_moves_where_one_parameter_cannot(bad, message):
    first, second = made((64, 96))[0], made((64, 96))[0]
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
    bad(second)
    before = first.detach().clone()
    optimizer = AdamW8bit([first, second], lr=LR)
    with pytest.raises(SparseGradError, match=message):
        optimizer.step()
    assert torch.equal(first, before)
    assert not optimizer.state


def test_it_has_one_implementation():
    with pytest.raises(MethodError, match="adamw8bit steps in a for-loop alone, got the optimizer_impl fused"):
        Setting({}, optimizer="adamw8bit", optimizer_impl="fused")


@pytest.mark.parametrize(
    "method", ["meprop-weight", "meprop-unified", "sparsegrad", "sparsegrad-folded", "sparsegrad-compact"]
)
def test_methods_with_sparse_gradients_refuse_it(method):
    with pytest.raises(MethodError, match=f"{method} has sparse gradients.*leave --optimizer adamw8bit out"):
        get(method)(3, Setting({}, optimizer="adamw8bit"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bitsandbytes_stores_the_same(shape):
    optim = pytest.importorskip("bitsandbytes.optim", reason="the extra [bitsandbytes] is not installed")
    parameter, gradient = made(shape)
    other = nn.Parameter(parameter.detach().clone())
    own, theirs = AdamW8bit([parameter], lr=LR), optim.AdamW8bit([other], lr=LR, weight_decay=0.0)
    parameter.grad = gradient()
    other.grad = parameter.grad.clone()
    own.step()
    theirs.step()
    torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-7)
    ours, other_state = own.state[parameter], theirs.state[other]
    bytes_of = [
        sum(t.numel() * t.element_size() for t in state.values() if isinstance(t, torch.Tensor))
        for state in (ours, other_state)
    ]
    assert bytes_of[0] == bytes_of[1]
    g = parameter.grad.double().flatten()
    exact = {"exp_avg": (1 - BETAS[0]) * g, "exp_avg_sq": (1 - BETAS[1]) * g**2}
    for n, (name, table) in enumerate(TABLES.items(), 1):
        torch.testing.assert_close(other_state[f"qmap{n}"], table, rtol=0, atol=1e-6)
        largest = other_state[f"absmax{n}"]
        torch.testing.assert_close(ours[f"{name}_largest"], largest, rtol=1e-5, atol=0)
        # Its kernel for CPUs does not always take the nearest value, but one at most the table's widest interval
        # away; ours is never further off.
        at = largest.double().repeat_interleave(BLOCK)[: g.numel()].clamp_min(1e-300)
        own_values, their_values = (
            table.double()[codes.flatten().long()] for codes in (ours[name], other_state[f"state{n}"])
        )
        assert float((own_values - their_values).abs().max()) <= float(table.diff().max()) * (1 + 1e-6)
        off = [(values - exact[name] / at).abs() for values in (own_values, their_values)]
        assert float((off[0] - off[1]).max()) < 1e-6
