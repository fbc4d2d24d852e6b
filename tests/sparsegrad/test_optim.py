"""SparseAdam against torch's, and against Adam written out for single entries; SparseSGD against dense SGD."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsegrad import FoldedLinear, SparseAdam, SparseGradError, SparseSGD, TransitionMatrices

# Same formula, other order of operations: float64 rounding, over some fifty steps.
TIGHT = {"rtol": 1e-12, "atol": 1e-14}


def coo(shape, nnz: int, sparse_dim: int | None = None) -> torch.Tensor:
    """A random coalesced gradient with `nnz` distinct places over the first `sparse_dim` dimensions."""
    sparse_dim = len(shape) if sparse_dim is None else sparse_dim
    places = torch.randperm(math.prod(shape[:sparse_dim]))[:nnz].sort().values
    indices = torch.stack(torch.unravel_index(places, shape[:sparse_dim]))
    values = torch.randn(nnz, *shape[sparse_dim:], dtype=torch.float64)
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True).coalesce()


def parameters(*shapes) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]


def twins(*shapes) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    ours = parameters(*shapes)
    return ours, copy.deepcopy(ours)


def give(gradients, *owners) -> None:
    """Each owner's parameters get their own copies of the gradients; None stays None."""
    for owner in owners:
        for parameter, gradient in zip(owner, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()


def assert_same(ours, reference, **tolerance) -> None:
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("options", [{}, {"lr": 0.3}, {"betas": (0.5, 0.7)}, {"betas": (0.0, 0.9)}, {"eps": 0.1}])
@pytest.mark.parametrize(
    ("shape", "sparse_dim", "nnz"),
    [
        ((7, 5), 2, 4),
        ((7, 5), 2, 35),
        ((7, 5), 2, 1),
        ((7, 5), 1, 3),
        ((11,), 1, 4),
        ((3, 2, 5), 3, 6),
        ((3, 2, 5), 2, 2),
    ],
)
def test_steps_are_those_of_torch(shape, sparse_dim, nnz, options):
    ours, theirs = twins(shape)
    optimizer, reference = SparseAdam(ours, **options), torch.optim.SparseAdam(theirs, **options)
    start = ours[0].detach().clone()
    for _ in range(50):
        give([coo(shape, nnz, sparse_dim)], ours, theirs)
        optimizer.step()
        reference.step()
    assert_same(ours, theirs, **TIGHT)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(optimizer.state[ours[0]][name], reference.state[theirs[0]][name], **TIGHT)
    assert not torch.equal(ours[0], start)


def test_steps_are_adam_on_single_entries():
    """Moments of an entry move only when its gradient comes; the bias correction counts all steps."""
    lr, (beta1, beta2), eps = 0.1, (0.9, 0.999), 1e-8
    weight = [0.5, -1.0, 2.0]
    m, v = [0.0] * 3, [0.0] * 3
    (ours,) = parameters((3, 1))
    with torch.no_grad():
        ours.copy_(torch.tensor(weight).unsqueeze(1))
    optimizer = SparseAdam([ours], lr=lr, betas=(beta1, beta2), eps=eps)
    for step, gradients in enumerate([{0: 0.3, 1: -2.0}, {1: 0.7}, {}, {0: -0.1}, {1: 1.5}], start=1):
        for i, g in gradients.items():
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            corrected = math.sqrt(1 - beta2**step) / (1 - beta1**step)
            weight[i] -= lr * corrected * m[i] / (math.sqrt(v[i]) + eps)
        places = torch.tensor([list(gradients), [0] * len(gradients)], dtype=torch.long).view(2, -1)
        values = torch.tensor(list(gradients.values()), dtype=torch.float64)
        ours.grad = torch.sparse_coo_tensor(places, values, (3, 1), check_invariants=True)
        optimizer.step()
    assert ours.flatten().tolist() == pytest.approx(weight, rel=1e-12)
    assert ours[2].item() == 2.0  # never in a gradient


def test_uncoalesced_gradients_count_each_place_once():
    ours, theirs = twins((7, 5))
    optimizer, reference = SparseAdam(ours), torch.optim.SparseAdam(theirs)
    for _ in range(10):
        rows, cols = torch.randint(0, 2, (9,)), torch.randint(0, 2, (9,))  # at most 4 places: some come again
        values = torch.randn(9, dtype=torch.float64)
        gradient = torch.sparse_coo_tensor(torch.stack((rows, cols)), values, (7, 5), check_invariants=True)
        assert not gradient.is_coalesced()
        give([gradient], ours, theirs)
        optimizer.step()
        reference.step()
    assert_same(ours, theirs, **TIGHT)


def test_groups_parameters_without_gradient_and_empty_gradients():
    shapes = [(7, 5), (5, 3), (11, 2)]
    ours, theirs = twins(*shapes)

    def groups(p):
        return [{"params": p[:2], "lr": 0.2, "betas": (0.8, 0.9)}, {"params": p[2:], "eps": 1e-3}]

    optimizer, reference = SparseAdam(groups(ours)), torch.optim.SparseAdam(groups(theirs))
    for step in range(12):
        gradients = [coo(shape, step % 4) for shape in shapes]  # every fourth has no entry
        gradients[step % 3] = None
        give(gradients, ours, theirs)
        optimizer.step()
        reference.step()
    assert_same(ours, theirs, **TIGHT)


def test_a_scheduler_changes_the_step_size():
    ours, theirs = twins((7, 5))
    pairs = [(SparseAdam(ours), ours), (torch.optim.SparseAdam(theirs), theirs)]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 5) for optimizer, _ in pairs]
    for _ in range(5):
        give([coo((7, 5), 4)], ours, theirs)
        for (optimizer, _), scheduler in zip(pairs, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
    assert_same(ours, theirs, **TIGHT)


def test_what_the_gradient_does_not_name_stays():
    (ours,) = parameters((7, 5))
    optimizer = SparseAdam([ours], lr=0.1)
    for _ in range(5):
        before = ours.detach().clone()
        gradient = coo((7, 5), 4)
        give([gradient], [ours])
        optimizer.step()
        named = torch.zeros(7, 5, dtype=torch.bool)
        named[tuple(gradient.indices())] = True
        assert torch.equal(ours != before, named)


def test_moments_are_stored_dense():
    (ours,) = parameters((7, 5))
    optimizer = SparseAdam([ours])
    assert not optimizer.state
    give([coo((7, 5), 2)], [ours])
    optimizer.step()
    state = optimizer.state[ours]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (7, 5)
    assert state["exp_avg"].layout == state["exp_avg_sq"].layout == torch.strided


def test_state_dict_round_trip_continues_as_if_nothing_happened(tmp_path):
    ours = parameters((7, 5), (5, 3))
    groups = [{"params": ours[:1], "lr": 0.1}, {"params": ours[1:], "betas": (0.5, 0.6)}]
    optimizer = SparseAdam(groups)
    gradients = [[coo((7, 5), 4), coo((5, 3), 2)] for _ in range(8)]
    for step in gradients[:4]:
        give(step, ours)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again = copy.deepcopy(ours)
    fresh = SparseAdam([{"params": again[:1]}, {"params": again[1:]}])
    fresh.load_state_dict(torch.load(tmp_path / "state.pt"))
    for step in gradients[4:]:
        give(step, ours, again)
        optimizer.step()
        fresh.step()
    assert_same(ours, again, rtol=0, atol=0)


def test_state_of_torch_is_understood():
    ours, theirs = twins((7, 5))
    reference = torch.optim.SparseAdam(theirs)
    optimizer = SparseAdam(ours)
    for _ in range(3):
        give([coo((7, 5), 4)], theirs)
        reference.step()
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    with torch.no_grad():
        ours[0].copy_(theirs[0])
    for _ in range(3):
        give([coo((7, 5), 4)], ours, theirs)
        optimizer.step()
        reference.step()
    assert_same(ours, theirs, **TIGHT)


def test_step_returns_the_closures_loss():
    (ours,) = parameters((3, 2))
    optimizer = SparseAdam([ours])

    def closure():
        assert torch.is_grad_enabled()
        give([coo((3, 2), 2)], [ours])
        return 1.5

    before = ours.detach().clone()
    assert optimizer.step(closure) == 1.5
    assert not torch.equal(ours, before)
    assert optimizer.step() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_types_take_the_first_step_of_adam(dtype):
    """m is (1 - beta1) g and v is (1 - beta2) g^2: but for eps, every named entry moves by lr."""
    ours = nn.Parameter(torch.zeros(7, 5, dtype=dtype))
    optimizer = SparseAdam([ours], lr=0.25)
    gradient = coo((7, 5), 6)
    ours.grad = gradient.to(dtype)
    optimizer.step()
    assert ours.dtype == optimizer.state[ours]["exp_avg"].dtype == dtype
    g = gradient.to_dense().to(dtype).double()
    expected = -0.25 * g / (g.abs() + 1e-8 / math.sqrt(1 - 0.999))
    # Four roundings (1 - beta2, its root, the root of v, the quotient), each to half a unit of the last place.
    torch.testing.assert_close(ours.detach().double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_a_dense_gradient_is_refused_before_anything_moves():
    ours = parameters((7, 5), (5, 3))
    optimizer = SparseAdam([{"params": ours[:1]}, {"params": ours[1:]}])
    give([coo((7, 5), 4), torch.ones(5, 3, dtype=torch.float64)], ours)
    before = [parameter.detach().clone() for parameter in ours]
    with pytest.raises(SparseGradError, match=r"sparse COO gradients, got a torch.strided one of shape \(5, 3\)"):
        optimizer.step()
    assert_same(ours, before, rtol=0, atol=0)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"betas": (1.0, 0.9)}, r"betas must be in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, r"betas must be in \[0, 1\)"),
    ],
)
def test_hyper_parameters_out_of_range(options, message):
    with pytest.raises(SparseGradError, match=message):
        SparseAdam(parameters((3, 2)), **options)


# Moments of some entries


@pytest.mark.parametrize("capacity", [5, 100])
@pytest.mark.parametrize("nnz", [7, 20, 35])
def test_a_store_for_the_whole_weight_is_torchs(capacity, nnz):
    ours, theirs = twins((7, 5))
    optimizer, reference = SparseAdam(ours, lr=0.1, capacity=capacity), torch.optim.SparseAdam(theirs, lr=0.1)
    for _ in range(50):
        give([coo((7, 5), nnz)], ours, theirs)
        optimizer.step()
        reference.step()
    assert_same(ours, theirs, **TIGHT)
    state = optimizer.state[ours[0]]
    # Every entry has had its turn, so slot i holds entry i.
    assert state["index"].tolist() == list(range(35))
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[name], reference.state[theirs[0]][name].flatten(), **TIGHT)


@pytest.mark.parametrize("capacity", [1, 2])
def test_a_support_that_does_not_move_is_torchs(capacity):
    ours, theirs = twins((7, 5))
    optimizer, reference = SparseAdam(ours, lr=0.1, capacity=capacity), torch.optim.SparseAdam(theirs, lr=0.1)
    support = coo((7, 5), 6)
    for _ in range(30):
        values = torch.randn(6, dtype=torch.float64)
        give([torch.sparse_coo_tensor(support.indices(), values, (7, 5), check_invariants=True)], ours, theirs)
        optimizer.step()
        reference.step()
    assert_same(ours, theirs, **TIGHT)


def stored_adam(weight, gradients, slots, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8):
    """Adam entry by entry over a dictionary of at most `slots` moments; the smallest second moments leave it."""
    moments = {}
    for step, gradient in enumerate(gradients, start=1):
        new = {}
        for i, g in gradient.items():
            m, v = moments.get(i, (0.0, 0.0))
            new[i] = (beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g)
            m, v = new[i]
            weight[i] -= lr * math.sqrt(1 - beta2**step) / (1 - beta1**step) * m / (math.sqrt(v) + eps)
        others = sorted((i for i in moments if i not in new), key=lambda i: -moments[i][1])
        moments = new | {i: moments[i] for i in others[: slots - len(new)]}
    return weight, moments


@pytest.mark.parametrize(("capacity", "nnz", "size"), [(1, 4, 35), (2, 4, 35), (3, 9, 35), (4, 1, 35), (1, 11, 11)])
def test_a_full_store_drops_the_smallest_second_moments(capacity, nnz, size):
    (ours,) = parameters((size // 5, 5) if size == 35 else (size, 1))
    optimizer = SparseAdam([ours], lr=0.1, capacity=capacity)
    start = ours.detach().flatten().tolist()
    slots = min(size, capacity * nnz)
    history = []
    for _ in range(40):
        gradient = coo(tuple(ours.shape), nnz)
        places = (gradient.indices()[0] * ours.shape[1] + gradient.indices()[1]).tolist()
        history.append(dict(zip(places, gradient.values().tolist(), strict=True)))
        give([gradient], [ours])
        optimizer.step()
        weight, moments = stored_adam(list(start), history, slots)
        assert ours.flatten().tolist() == pytest.approx(weight, rel=1e-11, abs=1e-13)
        state = optimizer.state[ours]
        assert state["index"].numel() == slots
        used = state["index"] < size
        assert state["index"][used].tolist() == sorted(moments)
        for name, which in (("exp_avg", 0), ("exp_avg_sq", 1)):
            expected = [moments[i][which] for i in sorted(moments)]
            assert state[name][used].tolist() == pytest.approx(expected, rel=1e-11, abs=1e-15)


def test_a_store_grows_with_the_gradient():
    ours, theirs = twins((7, 5))
    optimizer, reference = SparseAdam(ours, lr=0.1, capacity=3), torch.optim.SparseAdam(theirs, lr=0.1)
    for nnz, slots in [(0, None), (2, 6), (1, 6), (4, 12), (0, 12), (3, 12), (35, 35), (5, 35)]:
        give([coo((7, 5), nnz)], ours, theirs)
        optimizer.step()
        reference.step()
        index = optimizer.state[ours[0]].get("index")
        assert (None if index is None else index.numel()) == slots
    # At most 10 entries had come before the one that named all: none was ever dropped.
    assert_same(ours, theirs, **TIGHT)


def test_a_step_holds_nothing_of_the_weights_size():
    weight = nn.Parameter(torch.randn(64, 64))
    optimizer = SparseAdam([weight], capacity=4)
    largest = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() != weight.untyped_storage().data_ptr():
                        largest.append(storage.nbytes())
            return result

    for _ in range(3):
        weight.grad = coo((64, 64), 40).float()
        with Largest():
            optimizer.step()
    # 160 slots; a sort's int64 order is the widest thing.
    assert max(largest) == 8 * 160
    state = optimizer.state[weight]
    assert {name: (value.dtype, value.numel()) for name, value in state.items() if name != "step"} == {
        "index": (torch.int32, 160),
        "exp_avg": (torch.float32, 160),
        "exp_avg_sq": (torch.float32, 160),
    }


def test_a_store_survives_a_state_dict(tmp_path):
    # Positions past 256 are not whole numbers of bfloat16, to which torch casts a state.
    ours = [nn.Parameter(torch.randn(40, 50).bfloat16())]
    optimizer = SparseAdam(ours, capacity=2)
    gradients = [coo((40, 50), 30).bfloat16() for _ in range(8)]
    for gradient in gradients[:4]:
        give([gradient], ours)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again = copy.deepcopy(ours)
    fresh = SparseAdam(again)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert fresh.state[again[0]]["index"].dtype == torch.int32
    for gradient in gradients[4:]:
        give([gradient], ours, again)
        optimizer.step()
        fresh.step()
    assert_same(ours, again, rtol=0, atol=0)
    for name in ("index", "exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[ours[0]][name], fresh.state[again[0]][name])


def test_whole_rows_have_no_store():
    (ours,) = parameters((7, 5))
    optimizer = SparseAdam([ours], capacity=2)
    give([coo((7, 5), 3, sparse_dim=1)], [ours])
    with pytest.raises(SparseGradError, match="single entries, got one of whole rows"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("capacity", [0, -1, 1.5, True])
def test_a_capacity_out_of_range(capacity):
    with pytest.raises(SparseGradError, match=f"capacity must be an integer of at least 1, or None, got {capacity}"):
        SparseAdam(parameters((3, 2)), capacity=capacity)


# --- SGD


@pytest.mark.parametrize(
    ("shape", "sparse_dim", "nnz"), [((7, 5), 2, 4), ((7, 5), 1, 3), ((11,), 1, 4), ((7, 5), 2, 0)]
)
def test_sgd_is_dense_sgd_of_the_dense_gradient(shape, sparse_dim, nnz):
    ours, reference = twins(shape, (3, 2))
    optimizer, other = SparseSGD(ours, lr=0.3), torch.optim.SGD(reference, lr=0.3)
    for _ in range(3):
        gradient = coo(shape, nnz, sparse_dim)
        give([gradient, None], ours)
        give([gradient.to_dense(), None], reference)
        optimizer.step()
        other.step()
    assert_same(ours, reference, **TIGHT)
    assert not optimizer.state


def test_sgd_adds_up_what_stands_at_one_place():
    (weight,) = parameters((3, 2))
    before = weight.detach().clone()
    values = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    weight.grad = torch.sparse_coo_tensor([[0, 0, 2], [1, 1, 0]], values, (3, 2), check_invariants=True)
    SparseSGD([weight], lr=0.5).step()
    expected = torch.tensor([[0, 1.5], [0, 0], [2.5, 0]], dtype=torch.float64)
    torch.testing.assert_close(before - weight.detach(), expected, **TIGHT)


@pytest.mark.parametrize("sides", ["UV", "U", "V", ""])
def test_sgd_turns_its_step_out_of_the_basis(sides):
    matrices = {side: torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for side, n in (("U", 5), ("V", 7))}
    U, V = (matrices[side] if side in sides else None for side in "UV")
    layer = FoldedLinear(nn.Linear(5, 7, dtype=torch.float64), TransitionMatrices(U, V), nnz=9)
    layer(torch.randn(6, 5, dtype=torch.float64)).square().sum().backward()
    before, gradient = layer.weight.detach().clone(), layer.weight.grad.to_dense()
    SparseSGD([layer.weight], lr=0.25).step()
    left = gradient if V is None else V.T @ gradient
    step = left if U is None else left @ U
    torch.testing.assert_close(layer.weight.detach(), before - 0.25 * step, rtol=1e-12, atol=1e-12)


def test_sgd_refuses_what_is_not_its_own():
    (weight,) = parameters((3, 2))
    with pytest.raises(SparseGradError, match="lr must be positive, got 0"):
        SparseSGD([weight], lr=0)
    weight.grad = torch.ones(3, 2, dtype=torch.float64)
    before = weight.detach().clone()
    with pytest.raises(SparseGradError, match="SparseSGD needs sparse COO gradients, got a torch"):
        SparseSGD([weight]).step()
    assert torch.equal(weight.detach(), before)
