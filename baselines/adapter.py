"""What methods share that freeze a weight and train something small beside it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from baselines.method import Method
from sparsegrad.adapted import AdaptedLinear, adapted_layers, is_transposed, replace_layers, source_weight
from sparsegrad.autocast import like_linear
from sparsegrad.products import LiveRows

# Adapters are drawn as nn.Linear draws its weight: from the seed that initialised a model they would be its own rows.
SEED_OFFSET = 1_000_003


class AdapterLinear(AdaptedLinear):
    """A frozen linear layer with an adapter: (..., D_in) -> (..., D_out).

    `weight` (D_out, D_in) is the source's own storage, `bias` its parameter.

    Args:
        linear: nn.Linear or Conv1D.
    """

    def __init__(self, linear: nn.Module):
        weight = source_weight(linear)
        super().__init__(weight.shape[1], weight.shape[0], is_transposed(linear))
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        return self.of_rows(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def of_rows(self, x: Tensor) -> Tensor:
        """(T, D_in) -> (T, D_out)."""
        raise TypeError(f"{type(self).__name__} does not say what it computes")

    def own(self) -> Sequence[nn.Parameter]:
        """The parameters that the method trains."""
        raise TypeError(f"{type(self).__name__} does not say what it trains")


class AdapterMethod(Method):
    """Base of the methods that put an `AdapterLinear` in place of each target layer."""

    @abstractmethod
    def builder(self, model: nn.Module) -> Callable[[nn.Module], AdapterLinear]:
        """What makes the adapter of a target layer; called once, before any layer is replaced."""

    def prepare(self, model, batches):
        """Replace the target layers and set what trains. What is drawn comes from the setting's seed."""
        self.check_model(model)
        with torch.random.fork_rng():
            torch.manual_seed(self.setting.seed + SEED_OFFSET)
            replace_layers(model, self.target_names(), self.builder(model))
        layers = [layer for _, layer in adapted_layers(model)]
        # Frozen in either regime but for what trains. The bias is not the adapter's: the regime decides on it.
        held = [p for layer in layers for p in layer.parameters() if p is not layer.bias]
        self.freeze(model, [p for layer in layers for p in layer.own()], held)

    @classmethod
    def largest_budget(cls, shapes):
        """The rank of the smallest weight."""
        return min(min(shape) for shape in shapes)


@like_linear
class BottleneckFunction(torch.autograd.Function):
    """`Y = X W^T + b + s X A^T R^T B^T` with W and A frozen: X A^T is kept for backward, and nothing of X's width.

    R may be None: the identity.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, R, B, scaling):
        """x (T, D_in), weight (D_out, D_in), A (r, D_in), R (r, r), B (D_out, r) -> (T, D_out)."""
        low = x @ A.to(x.dtype).T
        y = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
        y.addmm_(_mixed(low, R), B.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(low, weight, A, R, B)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """dL/dY (T, D_out) -> dL/dX (T, D_in), dL/db (D_out,), dL/dR (r, r), dL/dB (D_out, r)."""
        low, weight, A, R, B = ctx.saved_tensors
        live = LiveRows(dy)
        low, dy = live.of(low), live.of(dy)
        need_x, _, need_bias, _, need_r, need_b, _ = ctx.needs_input_grad
        dx = dbias = dr = db = None
        if need_bias:
            dbias = dy.sum(0)
        if need_b:
            db = (dy.T @ _mixed(low, R)).mul_(ctx.scaling).to(B.dtype)
        if need_x or need_r:
            dlow = (dy @ B.to(dy.dtype)).mul_(ctx.scaling)
        if need_r:
            dr = (dlow.T @ low).to(R.dtype)
        if need_x:
            if R is not None:
                dlow = dlow @ R.to(dy.dtype)
            dx = live.back((dy @ weight).addmm_(dlow, A.to(dy.dtype)))
        return dx, None, dbias, None, dr, db, None


def _mixed(low: Tensor, R: Tensor | None) -> Tensor:
    return low if R is None else low @ R.to(low.dtype).T
