"""VeRA (Kopiczko et al., ICLR 2024, arXiv 2310.11454): `W + diag(b) B diag(d) A`, of which d and b train.

A and B are drawn once and shared by all layers. Where these differ in shape each takes the columns of A and the rows
of B that it needs, as peft's do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from baselines.adapter import AdapterLinear, AdapterMethod
from baselines.method import Knob, LayerBytes, size, target_shapes
from sparsegrad.autocast import like_linear
from sparsegrad.products import LiveRows

# What every entry of d begins with (the paper's section 3.3 and its ablation); b begins with zeros.
INITIAL_D = 0.1


@like_linear
class VeRAFunction(torch.autograd.Function):
    """`Y = X W^T + bias + X A^T M^T` with `M = diag(b) B diag(d)` (D_out, r): X A^T is kept for backward, and not X.

    M is made anew in either pass: with `G = dL/dY^T X A^T` (D_out, r) both `dL/db = (G * B) d` and
    `dL/dd = (G * B)^T b`, so that no other product with dL/dY is needed.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, d, b):
        """x (T, D_in), weight (D_out, D_in), A (r, D_in), B (D_out, r), d (r,), b (D_out,) -> (T, D_out)."""
        low = x @ A.to(x.dtype).T
        y = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
        y.addmm_(low, _scaled(B, d, b).to(x.dtype).T)
        ctx.save_for_backward(low, weight, A, B, d, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """dL/dY (T, D_out) -> dL/dX (T, D_in), the bias's gradient (D_out,), dL/dd (r,), dL/db (D_out,)."""
        low, weight, A, B, d, b = ctx.saved_tensors
        live = LiveRows(dy)
        low, dy = live.of(low), live.of(dy)
        need_x, _, need_bias, _, _, need_d, need_b = ctx.needs_input_grad
        dx = dbias = dd = db = None
        if need_bias:
            dbias = dy.sum(0)
        if need_d or need_b:
            gradient = (dy.T @ low).to(B.dtype).mul_(B)
            dd, db = gradient.T @ b if need_d else None, gradient @ d if need_b else None
            del gradient
        if need_x:
            dlow = dy @ _scaled(B, d, b).to(dy.dtype)
            dx = live.back((dy @ weight).addmm_(dlow, A.to(dy.dtype)))
        return dx, None, dbias, None, None, dd, db


def _scaled(B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """`diag(b) B diag(d)` (D_out, r)."""
    return (B * d).mul_(b.unsqueeze(1))


class SharedMatrices(nn.Module):
    """A (r, largest D_in) and B (largest D_out, r), drawn by He et al.'s uniform rule and frozen.

    A module of its own, that all layers hold: `.to()` and `deepcopy` then keep one copy.
    """

    A: Tensor
    B: Tensor

    def __init__(self, rank: int, d_out: int, d_in: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        for name, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
            matrix = torch.empty(shape, dtype=dtype, device=device)
            self.register_buffer(name, nn.init.kaiming_uniform_(matrix))


class VeRALinear(AdapterLinear):
    """`Y = X (W + diag(b) B diag(d) A)^T + bias`, of which d and b train: (..., D_in) -> (..., D_out).

    Args:
        linear: nn.Linear or Conv1D.
        shared: A and B, of which the first D_in columns and the first D_out rows are taken. d (r,) and b (D_out,) have
            their dtype; products are made in the input's.
    """

    def __init__(self, linear: nn.Module, shared: SharedMatrices):
        super().__init__(linear)
        self.shared = shared
        self.lambda_d = nn.Parameter(torch.full_like(shared.A[:, 0], INITIAL_D))
        self.lambda_b = nn.Parameter(shared.B.new_zeros(self.out_features))

    @property
    def A(self) -> Tensor:
        """(r, D_in), a view."""
        return self.shared.A[:, : self.in_features]

    @property
    def B(self) -> Tensor:
        """(D_out, r), a view."""
        return self.shared.B[: self.out_features]

    def of_rows(self, x: Tensor) -> Tensor:
        """(T, D_in) -> (T, D_out)."""
        return VeRAFunction.apply(x, self.weight, self.bias, self.A, self.B, self.lambda_d, self.lambda_b)

    def own(self) -> tuple[nn.Parameter, ...]:
        """d and b."""
        return self.lambda_d, self.lambda_b

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """`W + diag(b) B diag(d) A` (D_out, D_in)."""
        return self.weight + (_scaled(self.B, self.lambda_d, self.lambda_b) @ self.A).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Shape, bias and rank."""
        return f"{super().extra_repr()}, rank={len(self.lambda_d)}"


class VeRA(AdapterMethod):
    """VeRA on the target layers.

    Its rank is no rank of an update, which diag(b) makes a full one: the paper's 1024 for weights of 768 x 768 is more
    than their sides. So 256, the paper's for large models and peft's default, stands here too, and not LoRA's 7, of
    which the matrices to keep would be a thirtieth of what the method needs.
    """

    name = "vera"
    knob = Knob("rank", default=256)

    def builder(self, model):
        """Of `VeRALinear`s that share one A and one B, as large as the largest layers need."""
        shapes = target_shapes(model, self.setting.layers)
        weight = model.get_submodule(self.target_names()[0]).weight
        largest = max(d_out for d_out, _ in shapes), max(d_in for _, d_in in shapes)
        shared = SharedMatrices(self.budget, *largest, self.setting.own_dtype(weight.dtype), weight.device)
        return lambda layer: VeRALinear(layer, shared)

    def basis_tensors(self, model):
        """A and B."""
        shared = (module for module in model.modules() if isinstance(module, SharedMatrices))
        return (matrix for each in shared for matrix in (each.A, each.B))

    def layer_params(self, shape):
        """r + D_out."""
        return self.budget + shape[0]

    @classmethod
    def largest_budget(cls, shapes):
        """The size of the smallest weight: with more entries d would have more than the weight."""
        return min(shape[0] * shape[1] for shape in shapes)

    def formula(self, shape, tokens, dtype):
        """W; d and b with gradient and moments; A and B; X A^T (T, r) is saved, and not X.

        A and B are as large as this layer's kind needs; kinds share the larger ones.
        """
        own_dtype = self.setting.own_dtype(dtype)
        own = size(self.layer_params(shape), own_dtype)
        return LayerBytes(
            parameter=size(shape[0] * shape[1], dtype) + own,
            gradient=own,
            optimizer=2 * own,
            activation=size(tokens * self.budget, dtype),
            basis=size(self.budget * (shape[0] + shape[1]), own_dtype),
            keeps_input=False,
        )
