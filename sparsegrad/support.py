"""Which entries of a weight are trained: here the largest of its gradient, chosen anew at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsegrad.errors import SparseGradError
from sparsegrad.products import RowBlock


def resolve_nnz(shape: tuple[int, int], nnz: int | None = None, density: float | None = None) -> int:
    """The number of kept entries of a weight of `shape`, given as a count or as a density; at least 1.

    Raises:
        SparseGradError: not exactly one of the two is given, the density is outside (0, 1], or `nnz` is outside
            1 .. D_out * D_in.
    """
    size = shape[0] * shape[1]
    if (nnz is None) == (density is None):
        raise SparseGradError(f"give exactly one of nnz and density, got nnz={nnz} and density={density}")
    if density is not None:
        if not 0 < density <= 1:
            raise SparseGradError(f"density must be in (0, 1], got {density}")
        return max(1, round(density * size))
    if isinstance(nnz, bool) or not isinstance(nnz, int) or not 1 <= nnz <= size:
        raise SparseGradError(
            f"nnz must be an integer from 1 to {size} for a weight of {shape[0]} x {shape[1]}, got {nnz}"
        )
    return nnz


def topk_coo(gradient: RowBlock, nnz: int, shape: tuple[int, int]) -> Tensor:
    """The `nnz` entries of largest magnitude as a coalesced COO tensor of `shape` (D_out, D_in).

    `gradient` holds the rows that can be non-zero; it must have at least `nnz` entries. Exact: ties are broken as
    `torch.topk` breaks them.
    """
    block, rows = gradient
    flat = block.abs().view(-1).topk(nnz, sorted=False).indices
    # Ascending flat indices are what makes a COO tensor coalesced, and SparseAdam needs one.
    flat = flat.sort().values
    values = torch.take(block, flat)
    row = torch.div(flat, shape[1], rounding_mode="floor")
    col = flat.remainder_(shape[1])
    if rows is not None:
        row = rows[row]
    return torch.sparse_coo_tensor(torch.stack((row, col)), values, shape, is_coalesced=True, check_invariants=False)


def kept_energy(gradient: Tensor, density: float) -> float:
    """Share of the squared Frobenius norm that the largest `density` of the entries hold, in 0 .. 1."""
    squares = gradient.double().square().flatten()
    kept = squares.topk(resolve_nnz(gradient.shape, density=density)).values.sum()
    return float(kept / squares.sum())
