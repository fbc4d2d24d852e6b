"""SparseAdam on (index, value) gradients, with dense moments as torch keeps them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from sparsegrad.errors import SparseGradError


class SparseAdam(Optimizer):
    """Adam whose moments are read and written only where the gradient has entries.

    The same steps as `torch.optim.SparseAdam`: moments elsewhere do not decay, and they are stored DENSE, two numbers
    for each entry of the weight. A parameter whose gradient is None is left alone.

    Args:
        params: parameters whose gradients are sparse COO tensors; hybrid ones (whole rows) too.
        lr: step size.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.

    Raises:
        SparseGradError: a hyper-parameter is out of range, or a gradient is dense.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        if not lr > 0:
            raise SparseGradError(f"lr must be positive, got {lr}")
        if not eps > 0:
            raise SparseGradError(f"eps must be positive, got {eps}")
        if not all(0 <= beta < 1 for beta in betas):
            raise SparseGradError(f"betas must be in [0, 1), got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns the closure's loss where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter, _ in moved:
            if parameter.grad.layout != torch.sparse_coo:
                raise SparseGradError(
                    f"SparseAdam needs sparse COO gradients, got a {parameter.grad.layout} one of shape "
                    f"{tuple(parameter.shape)}; give this parameter to AdamW"
                )
        for parameter, group in moved:
            self._update(parameter, group["lr"], *group["betas"], group["eps"])
        return loss

    def _update(self, parameter: Tensor, lr: float, beta1: float, beta2: float, eps: float) -> None:
        gradient = parameter.grad
        if not gradient.is_coalesced():
            gradient = gradient.coalesce()
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        step = state["step"] = int(state["step"]) + 1

        index = ravel(gradient._indices(), gradient.shape)
        values = gradient._values()
        m = _rows(state["exp_avg"], gradient)
        v = _rows(state["exp_avg_sq"], gradient)
        # m <- m + (g - m)(1 - beta1), v <- v + (g^2 - v)(1 - beta2), at the gradient's entries alone.
        first = m.index_select(0, index)
        first.lerp_(values, 1 - beta1)
        m.index_copy_(0, index, first)
        second = v.index_select(0, index)
        second.mul_(beta2).addcmul_(values, values, value=1 - beta2)
        v.index_copy_(0, index, second)
        step_size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        first.div_(second.sqrt_().add_(eps)).mul_(-step_size)
        _rows(parameter, gradient).index_add_(0, index, first)


def ravel(indices: Tensor, shape: torch.Size) -> Tensor:
    """Flat positions over the sparse dimensions: (sparse_dim, k) -> (k,)."""
    flat = indices[0]
    for dim in range(1, indices.shape[0]):
        flat = flat * shape[dim] + indices[dim]
    return flat


def _rows(tensor: Tensor, gradient: Tensor) -> Tensor:
    """A view with one row for each position over the gradient's sparse dimensions."""
    return tensor.view(-1, *gradient.shape[gradient.sparse_dim() :])
