"""LoRA-XS (Balazy et al., arXiv 2405.17604): `W + B R A`, of which R (r x r) alone trains.

A and B come from the truncated singular value decomposition `W ~ U_r S_r V_r^T`: `B = U_r S_r` and `A = V_r^T`. (The
authors' code decomposes W^T instead, so that S_r stands with A. The bytes are the same.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from baselines.adapter import AdapterLinear, AdapterMethod, BottleneckFunction
from baselines.method import Knob, LayerBytes, size
from baselines.principal import principal_directions
from sparsegrad.adapted import adapted_layers

# The standard deviation that R begins with: small, so that the model begins next to where it was.
INITIAL_STD = 1e-5


class LoRAXSLinear(AdapterLinear):
    """`Y = X W^T + b + X A^T R^T B^T`, of which R alone trains: (..., D_in) -> (..., D_out).

    Args:
        linear: nn.Linear or Conv1D.
        rank: r.
        dtype: dtype of A, B and R; None for the weight's. Products are made in the input's.
    """

    A: Tensor
    B: Tensor

    def __init__(self, linear: nn.Module, rank: int, dtype: torch.dtype | None = None):
        super().__init__(linear)
        dtype = dtype or self.weight.dtype
        U, S, V = principal_directions(self.weight, rank)
        # Copies of their own: views would hold the whole decomposition.
        self.register_buffer("A", V.T.to(dtype, memory_format=torch.contiguous_format, copy=True))
        self.register_buffer("B", (U * S).to(dtype))
        self.R = nn.Parameter(torch.empty(rank, rank, dtype=dtype, device=self.weight.device))
        nn.init.normal_(self.R, std=INITIAL_STD)

    def of_rows(self, x: Tensor) -> Tensor:
        """(T, D_in) -> (T, D_out)."""
        return BottleneckFunction.apply(x, self.weight, self.bias, self.A, self.R, self.B, 1.0)

    def own(self) -> tuple[nn.Parameter]:
        """R."""
        return (self.R,)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """`W + B R A` (D_out, D_in)."""
        return self.weight + (self.B @ self.R @ self.A).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Shape, bias and rank."""
        return f"{super().extra_repr()}, rank={len(self.R)}"


class LoRAXS(AdapterMethod):
    """LoRA-XS on the target layers. The default rank is `lora`'s; the paper's are 4 to 64."""

    name = "lora-xs"
    knob = Knob("rank", default=7)

    def builder(self, model):
        """Of `LoRAXSLinear`s of the budget's rank."""
        return lambda layer: LoRAXSLinear(layer, self.budget, self.setting.own_dtype(layer.weight.dtype))

    def basis_tensors(self, model):
        """A and B of each layer."""
        return (matrix for _, layer in adapted_layers(model) for matrix in (layer.A, layer.B))

    def layer_params(self, shape):
        """r^2."""
        return self.budget**2

    def formula(self, shape, tokens, dtype):
        """W; R with gradient and moments; A and B, each layer's own; X A^T (T, r) is saved, and not X."""
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
