"""The two transition matrices of each kind of layer: streaming HOSVD of weight gradients.

The paper stacks the weight gradients of a kind into a `D_in x D_out x N` tensor and takes the left singular vectors
of two of its unfoldings. Those are the eigenvectors of the Gram matrices `sum_i G_i^T G_i` and `sum_i G_i G_i^T`,
which are accumulated gradient by gradient here: the stack never exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsegrad.errors import SparseGradError
from sparsegrad.gradients import default_backward, stream_gradients
from sparsegrad.mlp import checked_shapes
from sparsegrad.values import passes


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


class StreamingHOSVD:
    """Gram matrices of the two unfoldings of a stack of gradients (D_out, D_in) that is never stacked.

    Accumulates in at least float32 (float64 for float64 gradients); the eigenvectors are computed in float64.

    Args:
        d_out: rows of a gradient.
        d_in: columns of a gradient.
        ranks: how many directions of each side are wanted; all where not given.
    """

    def __init__(
        self,
        d_out: int,
        d_in: int,
        ranks: Ranks | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.ranks = ranks = Ranks(d_out, d_in) if ranks is None else ranks
        if not (0 <= ranks.k_out <= d_out and 0 <= ranks.k_in <= d_in) or not any(ranks):
            raise SparseGradError(
                f"ranks of a weight of {d_out} x {d_in} (D_out x D_in) must be from 0 to those numbers, and not both "
                f"0, got {ranks.k_out} x {ranks.k_in}"
            )
        self.dtype = torch.promote_types(dtype, torch.float32)
        options = {"dtype": self.dtype, "device": device}
        self.gram_in = torch.zeros(d_in, d_in, **options) if ranks.k_in else None
        self.gram_out = torch.zeros(d_out, d_out, **options) if ranks.k_out else None
        self.count = 0

    def update(self, gradient: Tensor) -> None:
        """Add one gradient G (D_out, D_in). Raises `SparseGradError` for a NaN or an infinity, and adds nothing."""
        low, high = torch.aminmax(gradient)
        if not passes(torch.isfinite(low) & torch.isfinite(high)):
            raise SparseGradError("a weight gradient holds NaN or infinity; lower the loss scale or check the batches")
        g = gradient.to(self.dtype)
        if self.gram_in is not None:
            self.gram_in.addmm_(g.T, g)
        if self.gram_out is not None:
            self.gram_out.addmm_(g, g.T)
        self.count += 1

    def transition_matrices(self, dtype: torch.dtype) -> TransitionMatrices:
        """The bases in `dtype`. Raises `SparseGradError` where no gradient, or none but zeros, was seen."""
        energy = (self.gram_out if self.gram_in is None else self.gram_in).diagonal().sum()
        if not passes(torch.isfinite(energy)):
            raise SparseGradError(f"the squares of the gradients overflow {self.dtype}; scale the loss down")
        if self.count == 0 or not passes(energy > 0):
            raise SparseGradError(
                f"{self.count} gradients were collected and all are zero: give at least one batch with a loss to reduce"
            )
        sides = ((self.gram_in, self.ranks.k_in), (self.gram_out, self.ranks.k_out))
        return TransitionMatrices(
            *(None if gram is None else leading_directions(gram)[:rank].to(dtype) for gram, rank in sides)
        )


def leading_directions(gram: Tensor) -> Tensor:
    """Eigenvectors of a symmetric (D, D) matrix as ROWS, by falling eigenvalue, float64.

    Each row's sign is fixed so that its entry of largest magnitude is positive: two runs agree.
    """
    vectors = torch.linalg.eigh(gram.double()).eigenvectors.flip(1).T
    pivot = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * pivot.sign()


def calibrate(
    model: nn.Module,
    layers: Mapping[str, Sequence[str]],
    batches: Iterable[object],
    backward: Callable[[nn.Module, object], None] = default_backward,
    ranks: Mapping[str, Ranks] | None = None,
) -> dict[str, TransitionMatrices]:
    """The transition matrices of each kind of layer (the paper's preliminary phase); the model is left as it was.

    Everything but the named layers is frozen meanwhile. Each weight gradient is consumed inside backward, as soon as
    it exists, and freed: at no time do two layers' gradients live. Parameters' `.grad` must be None.

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
    stream_gradients(
        model, layers, batches, backward, lambda kind, name, gradient: decomposition[kind].update(gradient)
    )
    result = {}
    for kind, names in layers.items():
        # Popped so that a kind's Gram matrices are freed before the next kind's are decomposed.
        result[kind] = decomposition.pop(kind).transition_matrices(model.get_submodule(names[0]).weight.dtype)
    return result
