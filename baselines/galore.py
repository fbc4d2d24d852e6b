"""GaLore: full fine-tuning with Adam's moments in a low-rank subspace of each gradient.

Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", ICML 2024, arXiv 2403.03507,
Algorithm 2. For G (m, n) with m <= n, every `gap` steps and at the first, P (m, r) becomes the r leading left singular
vectors of G. Each step

    R = P^T G,   N = Adam(R),   W <- W - lr alpha P N

and where m > n it is R = G Q with the right singular vectors Q (n, r), W <- W - lr alpha N Q^T. The moments stay as
they are when the projection changes.

This is the plain form: all gradients exist when the optimizer steps. The per-layer form, which steps each weight inside
backward and frees its gradient at once, is not it.

Where authors' code takes a whole SVD of G, the singular vectors here are the eigenvectors of the Gram matrix of the
smaller side, made in the place of that matrix: the same vectors without the other side's (as large as G). In float32
directions whose singular value is below a few thousandths of the largest are not resolved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baselines.low_rank import LowRankAdam, LowRankMethod, adam_, projects_left
from baselines.method import LayerBytes, size
from sparsegrad.products import BLOCK_FRACTION
from sparsegrad.values import passes


def leading_directions(gradient: Tensor, rank: int) -> Tensor:
    """P (smaller side, rank), in the gradient's dtype: its leading singular vectors on that side, by falling value.

    A gradient with a NaN or an infinity has none: they are NaN, so that the run is seen to diverge.
    """
    side = gradient if projects_left(gradient) else gradient.T
    gram = _gram(side)
    if not passes(gram.diagonal().sum().isfinite()):
        return side.new_full((side.shape[0], rank), torch.nan)
    # The eigenvectors take the matrix's place, column-major as LAPACK has them: it is symmetric.
    vectors = gram.T
    torch.linalg.eigh(vectors, out=(gram.new_empty(len(gram)), vectors))
    return vectors[:, -rank:].flip(1).to(gradient.dtype)


def _gram(side: Tensor) -> Tensor:
    """`side side^T` of (m, n), summed in at least float32."""
    dtype = torch.promote_types(side.dtype, torch.float32)
    if side.dtype == dtype:
        return side @ side.T
    # A copy of the whole in another dtype would be twice its size.
    gram = side.new_zeros(len(side), len(side), dtype=dtype)
    for part in side.split(-(-side.shape[1] // BLOCK_FRACTION), 1):
        wide = part.to(dtype)
        gram.addmm_(wide, wide.T)
        del wide
    return gram


class GaLoreAdam(LowRankAdam):
    """GaLore's Adam; `scale` is the paper's alpha."""

    def __init__(self, params, lr: float, rank: int, gap: int = 200, scale: float = 0.25, **options: object):
        super().__init__(params, lr, rank, gap, scale=scale, **options)

    def refresh(self) -> None:
        """Make the next step one that finds other projections; `gap` counts from there."""
        for state in self.state.values():
            state["age"] = None

    def update(self, parameter, state, group):
        """One step of one weight."""
        gradient = parameter.grad
        if state.get("age") in (None, group["gap"]):
            state["projection"] = leading_directions(gradient, group["rank"])
            state["age"] = 0
        state["age"] += 1
        projection, factor = state["projection"], -group["lr"] * group["scale"]
        if projects_left(gradient):
            step = adam_(projection.T @ gradient, state, group)
            parameter.addmm_(projection, step, alpha=factor)
        else:
            step = adam_(gradient @ projection, state, group)
            parameter.addmm_(step, projection.T, alpha=factor)


class GaLore(LowRankMethod):
    """Whole weights; moments of r max(D_out, D_in) entries and a projection of r min(D_out, D_in) for each.

    A step that finds another projection comes every `gap` steps and holds its decomposition besides; all others are
    alike. So what is measured is one of each, whose peak is that of a whole gap, and times count each by its share.
    """

    name = "galore"
    period = 2

    def begin_period(self, optimizers):
        """The first of the two steps finds a projection."""
        optimizers[0].refresh()

    def step_shares(self):
        """One step in `gap` finds a projection."""
        return (1 / self.gap, 1 - 1 / self.gap)

    def weight_optimizer(self, weights, lr):
        """GaLore's Adam."""
        return GaLoreAdam(weights, lr, self.budget, self.gap)

    def formula(self, shape, tokens, dtype):
        """W and its gradient; the projection, and two moments of the projected gradient."""
        weight = size(shape[0] * shape[1], dtype)
        state = size(self.budget * (min(shape) + 2 * max(shape)), dtype)
        return LayerBytes(parameter=weight, gradient=weight, optimizer=state)
