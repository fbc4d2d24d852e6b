"""The two transition matrices of each kind of layer: streaming HOSVD of weight gradients.

The paper stacks the weight gradients of a kind into a `D_in x D_out x N` tensor and takes the left singular vectors
of two of its unfoldings. Those are the eigenvectors of the Gram matrices `sum_i G_i^T G_i` and `sum_i G_i G_i^T`,
which are accumulated gradient by gradient here: the stack never exists. Where few directions of a large side are
wanted, no Gram matrix exists either: a sketch finds them. Nor does a gradient exist whole, but as the two factors that
backward has, unless it is smaller than they are or both Gram matrices are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsegrad.errors import SparseGradError
from sparsegrad.gradients import default_backward, stream_gradients
from sparsegrad.mlp import checked_shapes
from sparsegrad.values import check_finite, passes


class Ranks(NamedTuple):
    """How many leading directions of each side of a weight (D_out, D_in) are wanted; 0: that side is not rotated."""

    k_out: int
    k_in: int


class TransitionMatrices(nn.Module):
    """U (k_in, D_in) and V (k_out, D_out): orthonormal rows, ordered by falling singular value.

    All directions make a side an orthogonal matrix (the paper's form), fewer are the leading ones, and a side that is
    None is not rotated: its matrix is the identity.

    A module of its own, so that all layers of a kind hold the same one: `.to()` and `deepcopy` then keep one copy.
    """

    U: Tensor | None
    V: Tensor | None

    def __init__(self, U: Tensor | None, V: Tensor | None):
        super().__init__()
        for name, matrix in (("U", U), ("V", V)):
            if matrix is not None and (matrix.dim() != 2 or not 1 <= matrix.shape[0] <= matrix.shape[1]):
                raise SparseGradError(
                    f"{name} must be a matrix with at most as many rows as columns, got shape {tuple(matrix.shape)}"
                )
            # Contiguous, as `load` reads them: products with another layout can round differently.
            self.register_buffer(name, None if matrix is None else matrix.detach().contiguous())

    def check_fits(self, d_out: int, d_in: int, weight: Tensor) -> None:
        """Raise `SparseGradError` unless the matrices belong to (d_out, d_in) and share `weight`'s dtype and device."""
        for name, matrix, size in (("U", self.U, d_in), ("V", self.V, d_out)):
            if matrix is None:
                continue
            if matrix.shape[1] != size:
                raise SparseGradError(
                    f"a weight of {d_out} x {d_in} (D_out x D_in) needs {name} with {size} columns, "
                    f"got {matrix.shape[0]} x {matrix.shape[1]}"
                )
            if (matrix.dtype, matrix.device) != (weight.dtype, weight.device):
                raise SparseGradError(
                    f"{name} is {matrix.dtype} on {matrix.device}, the weight {weight.dtype} on {weight.device}; "
                    "move one of them with .to()"
                )

    def check_complete(self) -> None:
        """Raise `SparseGradError` where a side has leading directions alone: no basis of its whole space."""
        for name, matrix in (("U", self.U), ("V", self.V)):
            if matrix is not None and matrix.shape[0] != matrix.shape[1]:
                raise SparseGradError(
                    f"{name} must be square here, got {matrix.shape[0]} x {matrix.shape[1]} (leading directions alone)"
                )


# Rows or columns of a Gram matrix or a gradient, and rows of a basis, that are handled at once: a whole matrix of
# temporaries never lives.
_BLOCK, _ROWS = 256, 64
# More blocks would save little of the half that is not computed, and take longer to ask for than to multiply.
_MOST_BLOCKS = 5
# Blocks begin at multiples of it: products of columns that begin elsewhere take up to a fifth longer.
_ALIGNMENT = 64
# A sketch's test directions beyond the wanted ones: half as many again, and at least 8.
_OVERSAMPLING, _LEAST_OVERSAMPLING = 0.5, 8
# The share of a sketch's test directions that are drawn anew when it is refined.
_FRESH = 0.25


class StreamingHOSVD:
    """Leading directions of the two unfoldings of a stack of gradients (D_out, D_in) that is never stacked.

    A side of D with k wanted directions is exact or sketched, whichever costs less: with s = 1.5 k (at least k + 8,
    then up to a multiple of 16) a sketch takes 4 s D_out D_in operations a gradient and an exact Gram matrix, of which
    half is computed, D D_out D_in. So it is SKETCHED WHERE 4 s < D, and all directions, or more than about a sixth of
    them, are exact.

    Exact: the lower half of the D x D Gram matrix, summed in at least float32 (float64 for float64 gradients), and its
    eigenvectors in float64. In float32 the entry (i, j) of the sum A of N products over K entries is off by at most
    2^-24 (K + N) sqrt(A_ii A_jj), and was off by 6e-6 sqrt(A_ii A_jj) for N = 720, K = 3072: directions whose singular
    value is below a few thousandths of the largest are not resolved.

    Sketched: A Q for s orthonormal test directions Q, from which A is estimated by Nystrom's formula,
    A Q (Q^T A Q)^+ (A Q)^T, in float64. `refine` makes Q of the estimate's leading directions and, for a quarter,
    new random ones, which find what the estimate lacks; what was seen before counts by its estimate from then on. Its
    directions are exact where the gradients span no more than 3 s / 4 dimensions. Memory is 2 s D entries. Share of
    the energy of as many exact directions that they held, for 22 to 58 of 1536: 0.998 for gradients of an encoder (30
    steps; 0.97 without `refine`), 0.985 to 0.994 for a decoder's, whose spectrum falls slowly (10 steps; 0.93 to 0.96).

    Args:
        d_out: rows of a gradient.
        d_in: columns of a gradient.
        ranks: how many directions of each side are wanted; all where not given.
        dtype: the gradients'.
        device: the gradients'.
    """

    def __init__(
        self,
        d_out: int,
        d_in: int,
        ranks: Ranks | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        ranks = Ranks(d_out, d_in) if ranks is None else ranks
        if not (0 <= ranks.k_out <= d_out and 0 <= ranks.k_in <= d_in) or not any(ranks):
            raise SparseGradError(
                f"ranks of a weight of {d_out} x {d_in} (D_out x D_in) must be from 0 to those numbers, and not both "
                f"0, got {ranks.k_out} x {ranks.k_in}"
            )
        dtype = torch.promote_types(dtype, torch.float32)
        self.side_in = _side(d_in, ranks.k_in, dtype, device)
        self.side_out = _side(d_out, ranks.k_out, dtype, device)
        self.count = 0

    def update(self, gradient: Tensor) -> None:
        """Add one gradient G (D_out, D_in). Raises `SparseGradError` for a NaN or an infinity, and adds nothing."""
        check_finite(gradient)
        if self.side_in is not None:
            self.side_in.add(gradient.T)
        if self.side_out is not None:
            self.side_out.add(gradient)
        self.count += 1

    def update_product(self, dy: Tensor, x: Tensor) -> None:
        """Add the gradient G = dY^T X of dY (T, D_out) and X (T, D_in), which exists whole only where that is cheaper.

        Raises `SparseGradError` for a NaN or an infinity in dY, X or G, and adds nothing; one in a G that is not made
        is found in the sums, later.
        """
        if self._whole_is_cheaper(*dy.shape, x.shape[1]):
            self.update(dy.T @ x)
            return
        check_finite(dy)
        check_finite(x)
        if self.side_in is not None:
            self.side_in.add_product(x, dy)
        if self.side_out is not None:
            self.side_out.add_product(dy, x)
        self.count += 1

    def _whole_is_cheaper(self, tokens: int, d_out: int, d_in: int) -> bool:
        """Whether to make G once and add it takes fewer multiplications than to add it from its factors.

        From the factors each Gram matrix makes all of G for itself, and a sketch multiplies by both factors twice
        where it would by G twice. With one Gram matrix or none, G is then smaller than its factors are together. Where
        there is no token, and G is zero, there are no factors to look into.
        """
        sides = (self.side_in, self.side_out)
        grams = sum(isinstance(side, _Gram) for side in sides)
        width = sum(side.product.shape[1] for side in sides if isinstance(side, _Sketch))
        from_factors = grams * tokens * d_out * d_in + 2 * width * tokens * (d_out + d_in)
        return tokens == 0 or (tokens + 2 * width) * d_out * d_in < from_factors

    def refine(self) -> None:
        """Turn the sketches towards what was seen so far, for the gradients to come; exact sides stay as they are.

        To be called between steps. Raises `SparseGradError` where the gradients' squares overflow.
        """
        if self.count:
            self._check_finite()
            for side in (self.side_in, self.side_out):
                if isinstance(side, _Sketch):
                    side.refine()

    def transition_matrices(self, dtype: torch.dtype) -> TransitionMatrices:
        """The bases in `dtype`. Raises `SparseGradError` where no gradient, or none but zeros, was seen."""
        self._check_finite()
        if self.count == 0 or not passes(self._size() > 0):
            raise SparseGradError(
                f"{self.count} gradients were collected and all are zero: give at least one batch with a loss to reduce"
            )
        return TransitionMatrices(
            *(None if side is None else side.leading(dtype) for side in (self.side_in, self.side_out))
        )

    def _size(self) -> Tensor:
        return (self.side_out if self.side_in is None else self.side_in).size()

    def _check_finite(self) -> None:
        if not passes(torch.isfinite(self._size())):
            raise SparseGradError("the squares of the gradients overflow; scale the loss down")


def _side(size: int, rank: int, dtype: torch.dtype, device: torch.device | str) -> _Gram | _Sketch | None:
    """What accumulates one side of the gradients: the cheaper one, by shape and rank alone; None where rank is 0."""
    if rank == 0:
        return None
    width = rank + max(_LEAST_OVERSAMPLING, math.ceil(_OVERSAMPLING * rank))
    width = -(-width // 16) * 16
    return _Sketch(size, rank, width, dtype, device) if 4 * width < size else _Gram(size, rank, dtype, device)


class _Gram:
    """The sum A (D, D) of g g^T over matrices g (D, K): its lower half, in blocks of rows."""

    def __init__(self, size: int, rank: int, dtype: torch.dtype, device: torch.device | str):
        self.rank = rank
        rows = _block(size)
        ends = [*range(rows, size, rows), size]
        self.blocks = [
            torch.zeros(end - start, end, dtype=dtype, device=device)
            for start, end in zip([0, *ends], ends, strict=False)
        ]

    def add(self, g: Tensor) -> None:
        """Add g g^T."""
        for part in _columns(g, self.blocks[0].dtype):
            for block in self.blocks:
                rows, end = block.shape
                block.addmm_(part[end - rows : end], part[:end].T)
            del part  # or it would live beside the next

    def add_product(self, p: Tensor, q: Tensor) -> None:
        """Add g g^T for g = p^T q, made in blocks of columns: p (T, D), q (T, K)."""
        for part in q.split(_block(q.shape[1]), 1):
            self.add((p.T @ part).to(self.blocks[0].dtype))

    def size(self) -> Tensor:
        """The trace."""
        return torch.stack([block.diagonal(block.shape[1] - block.shape[0]).sum() for block in self.blocks]).sum()

    def lower(self) -> Tensor:
        """A in float64, column-major as LAPACK reads it; zero above the diagonal's blocks."""
        size = self.blocks[-1].shape[1]
        matrix = self.blocks[0].new_zeros(size, size, dtype=torch.float64).T
        for block in self.blocks:
            rows, end = block.shape
            matrix[end - rows : end, :end] = block
        return matrix

    def leading(self, dtype: torch.dtype) -> Tensor:
        """(rank, D): the leading eigenvectors as rows."""
        matrix = self.lower()
        # The eigenvectors take the matrix's place: a second one of its size never exists.
        torch.linalg.eigh(matrix, out=(matrix.new_empty(len(matrix)), matrix))
        return _signed(matrix.T, self.rank, dtype)


class _Sketch:
    """The product A Q of A (D, D), the sum of g g^T over matrices g (D, K), with test directions Q (D, s)."""

    def __init__(self, size: int, rank: int, width: int, dtype: torch.dtype, device: torch.device | str):
        self.rank = rank
        # A generator of its own, on the CPU: the same directions wherever the gradients are.
        self._generator = torch.Generator().manual_seed(0)
        self.product = torch.zeros(size, width, dtype=dtype, device=device)
        self.directions = torch.linalg.qr(self._random(width)).Q.to(dtype)

    def add(self, g: Tensor) -> None:
        """Add g g^T."""
        for part in _columns(g, self.product.dtype):
            self.product.addmm_(part, part.T @ self.directions)
            del part  # or it would live beside the next

    def add_product(self, p: Tensor, q: Tensor) -> None:
        """Add g g^T for g = p^T q, which is not made: p (T, D), q (T, K)."""
        dtype = self.product.dtype
        turned = self.product.new_zeros(q.shape[1], self.product.shape[1])  # g^T Q
        tokens = len(p) if p.dtype == dtype else _BLOCK
        blocks = [slice(start, start + tokens) for start in range(0, len(p), tokens)]
        # Nothing named: what was made of one block is gone before the next is taken.
        for block in blocks:
            turned.addmm_(q[block].to(dtype).T, p[block].to(dtype) @ self.directions)
        for block in blocks:
            self.product.addmm_(p[block].to(dtype).T, q[block].to(dtype) @ turned)

    def size(self) -> Tensor:
        """The largest magnitude in A Q: zero where A is (but for one Q in infinitely many)."""
        low, high = torch.aminmax(self.product)
        return torch.maximum(high, -low)

    def refine(self) -> None:
        """Replace Q by the estimate's leading directions and new random ones, and A Q by the estimate's product."""
        width = self.product.shape[1]
        fresh = int(_FRESH * width)
        factor = self._factor()
        # Kept where there is room for it: never more than two matrices of float64 live here.
        self.product.copy_(factor)
        factor[:, width - fresh :] = self._random(fresh)
        chosen = torch.linalg.qr(factor).Q
        del factor
        self.directions.copy_(chosen)
        factor = self.product.double()
        turned = factor.T @ chosen
        del chosen
        self.product.copy_(factor @ turned)

    def leading(self, dtype: torch.dtype) -> Tensor:
        """(rank, D): the estimate's leading eigenvectors as rows."""
        # The factor's columns are orthogonal up to rounding, and zero beyond the gradients' rank: QR mends both.
        return _signed(torch.linalg.qr(self._factor()[:, : self.rank]).Q.T.flip(0), self.rank, dtype)

    def _factor(self) -> Tensor:
        """F (D, s), float64: F F^T is the estimate of A, and F's columns are orthogonal, by falling norm."""
        product = self.product.double()
        values, vectors = torch.linalg.eigh(self.directions.double().T @ product)
        # Directions that the gradients do not have are rounding, whose inverse would drown the rest.
        least = 10 * torch.finfo(self.product.dtype).eps * values[-1]
        factor = product @ (vectors * torch.where(values > least, values, torch.inf).rsqrt())
        del product
        return factor @ torch.linalg.eigh(factor.T @ factor).eigenvectors.flip(1)

    def _random(self, count: int) -> Tensor:
        drawn = torch.randn(len(self.product), count, generator=self._generator, dtype=torch.float64)
        return drawn.to(self.product.device)


def _block(size: int) -> int:
    """How many of `size` rows or columns are taken at once."""
    return max(_BLOCK, -(-size // (_MOST_BLOCKS * _ALIGNMENT)) * _ALIGNMENT)


def _columns(g: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """g in `dtype`, in blocks of columns where it is of another: a copy of the whole would be twice g's size."""
    if g.dtype == dtype:
        yield g
        return
    for part in g.split(_block(g.shape[1]), 1):
        yield part.to(dtype)


def _signed(rising: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """The last `rank` rows of `rising`, last one first, in `dtype`; the signs of `rising` itself are changed.

    Each row's sign is fixed so that its entry of largest magnitude is positive: two runs agree.
    """
    count, size = rising.shape
    low, high = rising.aminmax(dim=1, keepdim=True)
    rising.mul_(torch.where(high >= -low, 1.0, -1.0))
    result = rising.new_empty(rank, size, dtype=dtype)
    for start in range(0, rank, _ROWS):
        end = min(start + _ROWS, rank)
        result[start:end] = rising[count - end : count - start].flip(0)
    return result


def check_bases(
    model: nn.Module, layers: Mapping[str, Sequence[str]], bases: Mapping[str, TransitionMatrices]
) -> dict[str, tuple[int, int]]:
    """Kind -> (D_out, D_in), as `checked_shapes`; raises `SparseGradError` also where a kind's basis does not fit."""
    shapes = checked_shapes(model, layers)
    for kind, shape in shapes.items():
        if kind not in bases:
            raise SparseGradError(
                f"no transition matrices are given for kind {kind!r}; there are some for: {', '.join(bases)}"
            )
        for name in layers[kind]:
            bases[kind].check_fits(*shape, model.get_submodule(name).weight)
    return shapes


def calibrate(
    model: nn.Module,
    layers: Mapping[str, Sequence[str]],
    batches: Iterable[object],
    backward: Callable[[nn.Module, object], None] = default_backward,
    ranks: Mapping[str, Ranks] | None = None,
) -> dict[str, TransitionMatrices]:
    """The transition matrices of each kind of layer (the paper's preliminary phase); the model is left as it was.

    Every parameter is frozen meanwhile. Each weight gradient is added to the sums inside backward, from its two
    factors, layer by layer. Parameters' `.grad` must be None.

    Args:
        model: any model; its mode (train or eval) is not touched.
        layers: kind -> names of the linear layers of that kind, as `find_layers` gives them.
        batches: what `backward` takes, one per step (the paper: 30); consumed one at a time.
        backward: runs forward and backward once.
        ranks: kind -> how many leading directions of each side; all where not given.

    Raises:
        SparseGradError: a name is no linear layer, layers of a kind differ in shape, a gradient is not finite, or no
            gradient arrives.
    """
    shapes = checked_shapes(model, layers)
    decomposition: dict[str, StreamingHOSVD] = {}
    for kind, names in layers.items():
        weight = model.get_submodule(names[0]).weight
        wanted = None if ranks is None else ranks[kind]
        decomposition[kind] = StreamingHOSVD(*shapes[kind], wanted, dtype=weight.dtype, device=weight.device)

    def step(model: nn.Module, batch: object) -> None:
        # Before a pass and not inside it: nothing but the model lives then.
        for hosvd in decomposition.values():
            hosvd.refine()
        backward(model, batch)

    stream_gradients(model, layers, batches, step, lambda kind, name, dy, x: decomposition[kind].update_product(dy, x))
    result = {}
    for kind, names in layers.items():
        hosvd = decomposition.pop(kind)
        result[kind] = hosvd.transition_matrices(model.get_submodule(names[0]).weight.dtype)
        # A kind's sums are freed before the next kind's are decomposed.
        del hosvd
    return result
