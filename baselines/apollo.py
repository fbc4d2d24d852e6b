"""APOLLO: the raw gradient, its channels scaled by what Adam does to a random projection of them.

Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", MLSys 2025, arXiv 2412.05270, Algorithm 1 with channel-
wise scaling. For G (m, n) with m <= n and P (r, m) of independent normal entries of variance 1 / r,

    R = P G,   R~ = Adam(R),   s_j = ||R~[:, j]|| / ||R[:, j]||,   W <- W - lr alpha G diag(s)

where m > n it is R = G P with P (n, r) and a factor for each row. Every `gap` steps P is another one. Of P only a seed
is stored: it is drawn again in every step. The norm-growth limiter (from Fira, as in the paper) scales an update
G diag(s) whose norm is more than gamma = 1.01 times that of the update before down to that. alpha is 1, which is what
the authors' scripts give APOLLO. APOLLO-Mini (rank 1, one factor for the whole weight) is not in this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baselines.low_rank import LowRankAdam, LowRankMethod, adam_, projects_left
from baselines.method import LayerBytes, size

# Apart from the seeds of models and supports; a weight's seeds, one for each gap, are far from the next weight's.
SEED_OFFSET, SEED_STRIDE = 2_000_003, 2**33


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms and factors are kept."""
    return torch.promote_types(dtype, torch.float32)


def projection(shape: tuple[int, int], seed: int, like: Tensor) -> Tensor:
    """P of the shape, (r, m) or (n, r), of normal entries with variance 1 / r; the global generator is not touched."""
    generator = torch.Generator(like.device).manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
    return drawn.mul_(min(shape) ** -0.5)


class APOLLOAdam(LowRankAdam):
    """APOLLO's optimizer. A step uses the gradients up: they are scaled in place, so that no copy of one exists.

    `seed` is the first weight's; `scale` is the paper's alpha, `gamma` the most by which an update's norm may grow.
    """

    def __init__(
        self,
        params,
        lr: float,
        rank: int,
        gap: int = 200,
        scale: float = 1.0,
        gamma: float = 1.01,
        seed: int = 0,
        **options: object,
    ):
        super().__init__(params, lr, rank, gap, scale=scale, gamma=gamma, **options)
        for n, parameter in enumerate(p for group in self.param_groups for p in group["params"]):
            self.state[parameter]["seed"] = seed + n * SEED_STRIDE

    def update(self, parameter, state, group):
        """One step of one weight."""
        gradient, rank = parameter.grad, group["rank"]
        dtype, left = norm_dtype(gradient.dtype), projects_left(gradient)
        seed = state["seed"] + (state["step"] - 1) // group["gap"]
        if left:
            projected = projection((rank, gradient.shape[0]), seed, gradient) @ gradient
        else:
            projected = gradient @ projection((gradient.shape[1], rank), seed, gradient)

        across = 0 if left else 1  # the dimension that a channel runs along
        before = torch.linalg.vector_norm(projected, dim=across).to(dtype)
        adam_(projected, state, group)
        factors = torch.linalg.vector_norm(projected, dim=across).to(dtype).div_(before)
        del projected
        # A channel whose projection is zero has no gradient that a factor could scale.
        factors.masked_fill_(before == 0, 0)

        if "norm" not in state:
            state["norm"] = gradient.new_zeros((), dtype=dtype)
        # The norm of the scaled gradient by those of its channels: it need not exist before it is limited.
        norm = (torch.linalg.vector_norm(gradient, dim=across).to(dtype) * factors).norm()
        most = group["gamma"] * state["norm"]
        excess = torch.where(most > 0, norm / most, 1).clamp_(min=1)
        state["norm"].copy_(norm / excess)
        gradient.mul_((factors / excess).to(gradient.dtype).unsqueeze(across))
        parameter.add_(gradient, alpha=-group["lr"] * group["scale"])


class APOLLO(LowRankMethod):
    """Whole weights; two moments of r max(D_out, D_in) entries for each, a norm and a seed."""

    name = "apollo"

    def weight_optimizer(self, weights, lr):
        """APOLLO's."""
        return APOLLOAdam(weights, lr, self.budget, self.gap, seed=self.setting.seed + SEED_OFFSET)

    def formula(self, shape, tokens, dtype):
        """W and its gradient; two moments of the projected gradient, and the norm of the last update."""
        weight = size(shape[0] * shape[1], dtype)
        state = size(2 * self.budget * max(shape), dtype) + size(1, norm_dtype(dtype))
        return LayerBytes(parameter=weight, gradient=weight, optimizer=state)
