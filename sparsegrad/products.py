"""The sparse-by-dense product (SparseGrad, equations 1 and 2) and its dense twin.

A matrix that is sparse in stripes has rows and columns that are zero throughout. `dL/dY~` is one in practice: the
row of a padding token is zero, and so are all rows but one where only the first token reaches the loss.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

# What is made in blocks (rows of the weight gradient, tokens of dL/dX) is made an eighth at a time, rounded up.
BLOCK_FRACTION = 8
# Fewer zero lines than this share are multiplied along: taking the others out would copy nearly the whole matrix.
LEAST_ZERO_SHARE = 1 / 8


class Stripes(NamedTuple):
    """Indices of the rows and columns that hold a non-zero; None where (nearly) every one does."""

    rows: Tensor | None
    cols: Tensor | None


def nonzero_stripes(a: Tensor) -> Stripes:
    """Rows and columns of `a` (M, N) that hold a non-zero (or a NaN)."""
    return Stripes(nonzero_lines(a, dim=1), nonzero_lines(a, dim=0))


def nonzero_lines(a: Tensor, dim: int) -> Tensor | None:
    """Indices of the lines of `a` (M, N) along `dim` that hold a non-zero; None where too few do not."""
    count = a.shape[1 - dim]
    if not a.numel():
        return None
    # Two extremes take a fifth of the time of counting, and make nothing of the size of `a`, as `a != 0` does.
    holds = a.amax(dim).ne(0) | a.amin(dim).ne(0)
    return holds.nonzero().squeeze(1) if skips(count - int(holds.sum()), count) else None


def skips(zero: int, count: int) -> bool:
    """Whether so many zero lines of `count` are left out of a product."""
    return 0 < zero and zero >= LEAST_ZERO_SHARE * count


class LiveRows:
    """The rows of `dL/dY` (T, D_out) that hold a non-zero, for a backward pass that skips the others.

    A token that does not reach the loss, padding above all, has a row of zeros, and adds nothing to any gradient.
    Where fewer than `LEAST_ZERO_SHARE` are zero, none is skipped.
    """

    def __init__(self, dy: Tensor):
        self._count = dy.shape[0]
        self._rows = nonzero_lines(dy, dim=1)

    def of(self, a: Tensor) -> Tensor:
        """Those rows of (T, P), a copy; `a` itself where none is skipped."""
        return a if self._rows is None else a[self._rows]

    def back(self, block: Tensor) -> Tensor:
        """(T, P) that holds the block at those rows and zeros elsewhere; `block` itself where none is skipped."""
        if self._rows is None:
            return block
        return block.new_zeros(self._count, block.shape[1]).index_copy_(0, self._rows, block)


def dense_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, the twin that pays for every zero: (M, N) x (N, P) -> (M, P)."""
    return a @ b


def sparse_by_dense(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` at the cost of the non-zero stripes of `a` alone: (M, N) x (N, P) -> (M, P).

    Equation 1: `C[rows] = A[rows][:, cols] B[cols]`, every other row of C is zero. Without a zero stripe it is the
    dense product, with no copy made.
    """
    rows, cols = nonzero_stripes(a)
    if cols is not None:
        b = b[cols]
    block = _take(a, rows, cols) @ b
    if rows is None:
        return block
    return a.new_zeros(a.shape[0], b.shape[1]).index_copy_(0, rows, block)


class RowBlock(NamedTuple):
    """Rows of a matrix whose other rows are zero: `block` (m, P) holds the rows `rows` (None: all of them)."""

    block: Tensor
    rows: Tensor | None


def transposed_dense_product(a: Tensor, b: Tensor) -> RowBlock:
    """`a.T @ b` in full: (T, M), (T, P) -> all M rows of (M, P)."""
    return RowBlock(a.T @ b, None)


def transposed_sparse_by_dense(a: Tensor, b: Tensor) -> RowBlock:
    """The non-zero rows of `a.T @ b`, for `a` (T, M) and `b` (T, P).

    Equation 2, the weight gradient: with `A = (dL/dY~)^T` only the tokens and the outputs that hold a non-zero enter,
    and the block keeps the indices of its rows so that its entries can be mapped back into a COO tensor.
    """
    tokens, outputs = nonzero_stripes(a)
    block = _take(a, tokens, outputs).T @ (b if tokens is None else b[tokens])
    return RowBlock(block, outputs)


def _take(a: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    if rows is not None:
        a = a[rows]
    return a if cols is None else a[:, cols]


# A block whose entries lie in less than this share of the columns is multiplied by those columns alone: more would cost
# more to gather than it saves.
NARROW = 1 / 4


class Selection:
    """Fixed entries (rows, cols) of an (M, P) matrix, cut into row blocks so that a product can be made block by block.

    Args:
        flat: sorted flat indices `row * P + col`, (k,), of any integer type.
        shape: (M, P).
        block_rows: rows per block; what `select` holds at once is one block of (block_rows, P).
    """

    def __init__(self, flat: Tensor, shape: tuple[int, int], block_rows: int):
        self.width = block_rows
        edges = torch.arange(0, shape[0] + block_rows, block_rows, device=flat.device) * shape[1]
        bounds = self._bounds(torch.searchsorted(flat.long(), edges), flat.numel(), shape[0])
        self.blocks = [(i, low, high) for i, (low, high) in enumerate(pairwise(bounds)) if low < high]
        self._narrow = {i for i, low, high in self.blocks if _is_narrow(flat[low:high], shape[1])}

    def _bounds(self, found: Tensor, count: int, rows: int) -> list[int]:
        try:
            return found.tolist()
        except DataDependentOutputException:
            # Fake: nobody knows where the entries are. Each block gets its rows' share.
            return [count * min(i * self.width, rows) // rows for i in range(found.numel())]

    def select(self, a: Tensor, b: Tensor, flat: Tensor, rotation: Tensor | None = None) -> Tensor:
        """The entries of `a.T @ b` at `flat`, for `a` (T, M) and `b` (T, P), without the whole product: (k,).

        With a `rotation` R (M, N) and `a` (T, N) those of `R @ a.T @ b`, where R too is applied block by block.
        """
        out = a.new_empty(flat.numel())
        # Every block begins at a multiple of its size. One temporary, whose size does not depend on where entries are.
        local = flat.to(torch.int64, copy=True).remainder_(self.width * b.shape[1])
        for i, low, high in self.blocks:
            rows = slice(i * self.width, (i + 1) * self.width)
            part = a[:, rows] if rotation is None else a @ rotation[rows].T
            if i in self._narrow:
                col, held = local[low:high].remainder(b.shape[1]), _held_columns(local[low:high], b.shape[1])
                block = part.T @ b[:, held.nonzero().squeeze(1)]
                where = local[low:high].div(b.shape[1], rounding_mode="floor").mul_(block.shape[1])
                where += held.cumsum(0).sub_(1)[col]
            else:
                where = local[low:high]
                block = part.T @ b
            torch.take(block, where, out=out[low:high])
            del part, block
        return out


def _held_columns(flat: Tensor, width: int) -> Tensor:
    """Which of the `width` columns hold an entry, (width,) of bool."""
    held = torch.zeros(width, dtype=torch.bool, device=flat.device)
    return held.index_fill_(0, flat.remainder(width).long(), True)


def _is_narrow(flat: Tensor, width: int) -> bool:
    try:
        return int(_held_columns(flat, width).sum()) < NARROW * width
    except DataDependentOutputException:
        # Fake: entries that are spread evenly lie in every column.
        return False
