"""Which entries of a weight are trained: here the largest of its gradient, chosen anew at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsegrad.errors import SparseGradError
from sparsegrad.products import RowBlock


def position_dtype(count: int) -> torch.dtype:
    """The narrowest index type for positions in a weight of `count` entries."""
    return torch.int32 if count <= torch.iinfo(torch.int32).max else torch.int64


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
    return _coo(flat, torch.take(block, flat), rows, shape)


def topk_coo_of_product(a: Tensor, b: Tensor, nnz: int, blocks: int) -> Tensor:
    """`topk_coo` of `a.T @ b`, for `a` (T, D_out) and `b` (T, D_in), made in row blocks: it never exists whole.

    Each block gives its own `nnz` largest entries, and of those and the ones kept so far the `nnz` largest are kept:
    exactly the largest of the whole, in shapes that do not depend on the values. Of several entries with the least
    magnitude that is kept, it is not said which are.

    Args:
        a: (T, D_out).
        b: (T, D_in).
        nnz: entries kept, at most D_out * D_in.
        blocks: at most so many blocks, of equally many rows but for the last.
    """
    height = -(-a.shape[1] // blocks)
    values = flat = None
    for first in range(0, a.shape[1], height):
        block = (a[:, first : first + height].T @ b).view(-1)
        found = block.abs().topk(min(nnz, block.numel()), sorted=False).indices
        entries = torch.take(block, found)
        del block
        found += first * b.shape[1]
        if values is None:
            values, flat = entries, found
        else:
            values, flat = torch.cat((values, entries)), torch.cat((flat, found))
        del entries, found
        if values.numel() > nnz:
            kept = values.abs().topk(nnz, sorted=False).indices
            values, flat = values[kept], flat[kept]
            del kept
    flat, order = flat.sort()
    return _coo(flat, values[order], None, (a.shape[1], b.shape[1]))


def _coo(flat: Tensor, values: Tensor, rows: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """Entries at ascending flat indices in the given rows as a COO tensor; `flat` is used up."""
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
