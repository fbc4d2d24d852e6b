"""PiSSA (Meng et al., NeurIPS 2024, arXiv 2404.02948): LoRA that begins from the weight's principal directions.

With the truncated singular value decomposition `W ~ U_r S_r V_r^T` it trains `B = U_r S_r^(1/2)` and
`A = S_r^(1/2) V_r^T`, and freezes the rest, `W_res = W - B A`.
"""

from __future__ import annotations

import torch
from torch import nn

from baselines.lora import LoRA, LoRALinear
from baselines.principal import principal_directions


class PiSSALinear(LoRALinear):
    """`Y = X W_res^T + b + (alpha / r) X A^T B^T`, of which A and B train: (..., D_in) -> (..., D_out).

    `weight` is W_res and its storage the layer's own, since others may hold the source's (tied weights). It is what is
    missing from the product of A and B as they are rounded, so that W is met up to the rounding of W_res.
    """

    def __init__(self, linear: nn.Module, rank: int, alpha: float, dtype: torch.dtype | None = None):
        super().__init__(linear, rank, alpha, dtype)
        U, S, V = principal_directions(self.weight, rank)
        root = (S / self.scaling).sqrt()
        with torch.no_grad():
            self.lora_A.copy_((V * root).T)
            self.lora_B.copy_(U * root)
            A, B = self.lora_A.to(self.weight.dtype), self.lora_B.to(self.weight.dtype)
            rest = torch.addmm(self.weight, B, A, alpha=-self.scaling)
        self.weight = nn.Parameter(rest, requires_grad=False)


class PiSSA(LoRA):
    """PiSSA on the target layers, the update not scaled (alpha = r). A step holds what one of `lora` holds."""

    name = "pissa"
    alpha_over_rank = 1.0
    layer_class = PiSSALinear
