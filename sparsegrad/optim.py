"""Optimizers on (index, value) gradients.

SparseAdam keeps dense moments as torch's does, or moments of some entries; SparseSGD keeps none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from sparsegrad.errors import SparseGradError
from sparsegrad.folded import add_from_basis
from sparsegrad.support import position_dtype


class SparseAdam(Optimizer):
    """Adam whose moments are read and written only where the gradient has entries.

    The same steps as `torch.optim.SparseAdam`: moments elsewhere do not decay, and they are stored DENSE, two numbers
    for each entry of the weight. A parameter whose gradient is None is left alone. Where a parameter has a
    `gradient_basis` (`FoldedLinear` says so of its weight), its gradient and its moments are in that basis, and the
    step is turned out of it.

    With a `capacity` c no tensor of the weight's size exists: moments are kept for c times as many entries as a
    gradient names, with a sorted position each. An entry without moments starts from zeros; where the slots are full,
    the entries with the smallest second moments lose theirs, never those of the step. The steps are the dense form's
    as long as no entry with moments was dropped. Trained on TREC (MiniLM-L6, 2.3 % of each MLP weight, 120 steps), the
    cosine of the update with the dense form's was, over steps 21 to 60 and 61 to 120,

    | dropped | c = 1 | c = 2 | c = 4 | c = 8 |
    |---|---|---|---|---|
    | smallest second moment | 0.75, 0.59 | 0.89, 0.71 | 0.96, 0.84 | 1.00, 0.96 |
    | least recently used | 0.75, 0.59 | 0.82, 0.65 | 0.94, 0.77 | 1.00, 0.93 |
    | smallest m / sqrt(v) | 0.75, 0.59 | 0.83, 0.67 | 0.88, 0.72 | 0.94, 0.80 |

    and by the first rule 28, 52, 69 and 82 % of a step's entries had moments over steps 21 to 60 (dense: 86 %).

    Args:
        params: parameters whose gradients are sparse COO tensors; hybrid ones (whole rows) too.
        lr: step size.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        capacity: slots per entry of a gradient, at least 1; None: dense moments. A larger gradient adds slots.

    Raises:
        SparseGradError: a hyper-parameter is out of range, a gradient is dense, or one of whole rows meets a capacity.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        capacity: int | None = None,
    ):
        if not lr > 0:
            raise SparseGradError(f"lr must be positive, got {lr}")
        if not eps > 0:
            raise SparseGradError(f"eps must be positive, got {eps}")
        if not all(0 <= beta < 1 for beta in betas):
            raise SparseGradError(f"betas must be in [0, 1), got {betas}")
        if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1):
            raise SparseGradError(f"capacity must be an integer of at least 1, or None, got {capacity!r}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "capacity": capacity})

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("capacity", None)

    def load_state_dict(self, state_dict):
        """As torch's; stored positions keep their integer type, where torch would cast them to the parameter's."""
        super().load_state_dict(state_dict)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(keys, own, strict=True):
            index = state_dict["state"].get(key, {}).get("index")
            if index is not None:
                self.state[parameter]["index"] = index.to(parameter.device, copy=True)

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns the closure's loss where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter, group in moved:
            _check_sparse(parameter, "SparseAdam", "AdamW")
            if group["capacity"] is not None and parameter.grad.dense_dim():
                raise SparseGradError(
                    "a capacity is for gradients of single entries, got one of whole rows; use capacity=None"
                )
        for parameter, group in moved:
            update = self._update if group["capacity"] is None else self._update_stored
            update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict) -> None:
        gradient = _coalesced(parameter.grad)
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        step = state["step"] = int(state["step"]) + 1

        index = ravel(gradient._indices(), gradient.shape)
        m = _rows(state["exp_avg"], gradient)
        v = _rows(state["exp_avg_sq"], gradient)
        first, second = m.index_select(0, index), v.index_select(0, index)
        _decay(first, second, gradient._values(), group)
        m.index_copy_(0, index, first)
        v.index_copy_(0, index, second)
        _add(parameter, gradient, index, _change(first, second, step, group))

    def _update_stored(self, parameter: Tensor, group: dict) -> None:
        gradient = _coalesced(parameter.grad)
        count = gradient._nnz()
        state = self.state[parameter]
        if not state:
            state["step"] = 0
        step = state["step"] = int(state["step"]) + 1
        if not count:
            return
        _make_room(state, parameter, count, group["capacity"])
        stored, m, v = state["index"], state["exp_avg"], state["exp_avg_sq"]

        index = ravel(gradient._indices(), gradient.shape)
        wanted = index.to(stored.dtype)
        slots = torch.searchsorted(stored, wanted).clamp_(max=stored.numel() - 1)
        missing = stored[slots] != wanted
        first, second = m[slots].masked_fill_(missing, 0), v[slots].masked_fill_(missing, 0)
        _decay(first, second, gradient._values(), group)

        # Those without a slot take the slots of the smallest second moments: never those that this step has found, and
        # unused ones before all others.
        rank = v.masked_fill(stored == parameter.numel(), -1)
        held = torch.full_like(first, math.inf).masked_fill_(missing, -math.inf)
        rank.scatter_reduce_(0, slots, held, "amax")
        del held
        free = rank.topk(count, largest=False, sorted=True).indices
        del rank
        slots = torch.where(missing, free[(missing.cumsum(0) - 1).clamp_(min=0)], slots)
        del free, missing
        stored[slots], m[slots], v[slots] = wanted, first, second
        del slots, wanted
        stored, order = stored.sort()
        state["index"].copy_(stored)
        del stored
        m.copy_(m[order])
        v.copy_(v[order])
        del order
        _add(parameter, gradient, index, _change(first, second, step, group))


class SparseSGD(Optimizer):
    """SGD without momentum on sparse COO gradients: `W <- W - lr G` at the entries of G, and no state.

    A parameter whose gradient is None is left alone. Where a parameter has a `gradient_basis`, the step is turned out
    of it, as `SparseAdam` does.

    Args:
        params: parameters whose gradients are sparse COO tensors; hybrid ones (whole rows) too.
        lr: step size.

    Raises:
        SparseGradError: lr is not positive, or a gradient is dense.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3):
        if not lr > 0:
            raise SparseGradError(f"lr must be positive, got {lr}")
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns the closure's loss where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter, _ in moved:
            _check_sparse(parameter, "SparseSGD", "SGD")
        for parameter, group in moved:
            gradient = parameter.grad
            # Entries at one index add up here: it need not be coalesced.
            change = gradient._values() * -group["lr"]
            _add(parameter, gradient, ravel(gradient._indices(), gradient.shape), change)
        return loss


def _check_sparse(parameter: Tensor, own: str, other: str) -> None:
    if parameter.grad.layout != torch.sparse_coo:
        raise SparseGradError(
            f"{own} needs sparse COO gradients, got a {parameter.grad.layout} one of shape "
            f"{tuple(parameter.shape)}; give this parameter to {other}"
        )


def _coalesced(gradient: Tensor) -> Tensor:
    return gradient if gradient.is_coalesced() else gradient.coalesce()


def _make_room(state: dict, parameter: Tensor, count: int, capacity: int) -> None:
    """Give the store slots for `capacity` gradients of `count` entries, unused ones where it has fewer.

    Slots are sorted by position; an unused one's is the parameter's size, past every entry.
    """
    size = parameter.numel()
    had = state["index"].numel() if "index" in state else 0
    room = min(size, capacity * count)
    if room <= had:
        return
    dtype = position_dtype(size)
    unused = {
        "index": torch.full((room - had,), size, dtype=dtype, device=parameter.device),
        "exp_avg": parameter.new_zeros(room - had),
        "exp_avg_sq": parameter.new_zeros(room - had),
    }
    for name, more in unused.items():
        state[name] = torch.cat((state[name], more)) if had else more


def _decay(m: Tensor, v: Tensor, values: Tensor, group: dict) -> None:
    """`m <- m + (g - m)(1 - beta1)`, `v <- v + (g^2 - v)(1 - beta2)`, in place."""
    beta1, beta2 = group["betas"]
    m.lerp_(values, 1 - beta1)
    v.mul_(beta2).addcmul_(values, values, value=1 - beta2)


def _change(m: Tensor, v: Tensor, step: int, group: dict) -> Tensor:
    """What Adam adds to the weight; both moments are used up."""
    beta1, beta2 = group["betas"]
    step_size = group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    return m.div_(v.sqrt_().add_(group["eps"])).mul_(-step_size)


def _add(parameter: Tensor, gradient: Tensor, index: Tensor, change: Tensor) -> None:
    """Add the change of the gradient's entries to the parameter; from the basis where the gradient is in one."""
    basis = getattr(parameter, "gradient_basis", None)
    if basis is None:
        _rows(parameter, gradient).index_add_(0, index, change)
    else:
        add_from_basis(parameter, gradient._indices(), change, basis)


def ravel(indices: Tensor, shape: torch.Size) -> Tensor:
    """Flat positions over the sparse dimensions: (sparse_dim, k) -> (k,)."""
    flat = indices[0]
    for dim in range(1, indices.shape[0]):
        flat = flat * shape[dim] + indices[dim]
    return flat


def _rows(tensor: Tensor, gradient: Tensor) -> Tensor:
    """A view with one row for each position over the gradient's sparse dimensions."""
    return tensor.view(-1, *gradient.shape[gradient.sparse_dim() :])
