"""The two transition matrices of each kind of layer: streaming HOSVD of weight gradients.

The paper stacks the weight gradients of a kind into a `D_in x D_out x N` tensor and takes the left singular vectors
of two of its unfoldings. Those are the eigenvectors of the Gram matrices `sum_i G_i^T G_i` and `sum_i G_i G_i^T`,
which are accumulated gradient by gradient here: the stack never exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparsegrad.adapted import is_transposed
from sparsegrad.errors import SparseGradError
from sparsegrad.mlp import checked_shapes
from sparsegrad.values import passes


class TransitionMatrices(nn.Module):
    """U (D_in, D_in) and V (D_out, D_out), orthogonal, rows ordered by falling singular value.

    A module of its own, so that all layers of a kind hold the same one: `.to()` and `deepcopy` then keep one copy.
    """

    U: Tensor
    V: Tensor

    def __init__(self, U: Tensor, V: Tensor):
        super().__init__()
        for name, matrix in (("U", U), ("V", V)):
            if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
                raise SparseGradError(f"{name} must be a square matrix, got shape {tuple(matrix.shape)}")
        # Contiguous, as `load` reads them: products with another layout can round differently.
        self.register_buffer("U", U.detach().contiguous())
        self.register_buffer("V", V.detach().contiguous())

    def check_fits(self, d_out: int, d_in: int, weight: Tensor) -> None:
        """Raise `SparseGradError` unless the matrices belong to (d_out, d_in) and share `weight`'s dtype and device."""
        if self.U.shape[0] != d_in or self.V.shape[0] != d_out:
            raise SparseGradError(
                f"a weight of {d_out} x {d_in} (D_out x D_in) needs U of {d_in} x {d_in} and V of {d_out} x {d_out}, "
                f"got U of {self.U.shape[0]} x {self.U.shape[1]} and V of {self.V.shape[0]} x {self.V.shape[1]}"
            )
        for name, matrix in (("U", self.U), ("V", self.V)):
            if (matrix.dtype, matrix.device) != (weight.dtype, weight.device):
                raise SparseGradError(
                    f"{name} is {matrix.dtype} on {matrix.device}, the weight {weight.dtype} on {weight.device}; "
                    "move one of them with .to()"
                )


class StreamingHOSVD:
    """Gram matrices of the two unfoldings of a stack of gradients (D_out, D_in) that is never stacked.

    Accumulates in at least float32 (float64 for float64 gradients); the eigenvectors are computed in float64.
    """

    def __init__(self, d_out: int, d_in: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.gram_in = torch.zeros(d_in, d_in, dtype=self.dtype, device=device)
        self.gram_out = torch.zeros(d_out, d_out, dtype=self.dtype, device=device)
        self.count = 0

    def update(self, gradient: Tensor) -> None:
        """Add one gradient G (D_out, D_in). Raises `SparseGradError` for a NaN or an infinity, and adds nothing."""
        low, high = torch.aminmax(gradient)
        if not passes(torch.isfinite(low) & torch.isfinite(high)):
            raise SparseGradError("a weight gradient holds NaN or infinity; lower the loss scale or check the batches")
        g = gradient.to(self.dtype)
        self.gram_in.addmm_(g.T, g)
        self.gram_out.addmm_(g, g.T)
        self.count += 1

    def transition_matrices(self, dtype: torch.dtype) -> TransitionMatrices:
        """The bases in `dtype`. Raises `SparseGradError` where no gradient, or none but zeros, was seen."""
        energy = self.gram_in.diagonal().sum()
        if not passes(torch.isfinite(energy)):
            raise SparseGradError(f"the squares of the gradients overflow {self.dtype}; scale the loss down")
        if self.count == 0 or not passes(energy > 0):
            raise SparseGradError(
                f"{self.count} gradients were collected and all are zero: give at least one batch with a loss to reduce"
            )
        return TransitionMatrices(
            leading_directions(self.gram_in).to(dtype), leading_directions(self.gram_out).to(dtype)
        )


def leading_directions(gram: Tensor) -> Tensor:
    """Eigenvectors of a symmetric (D, D) matrix as ROWS, by falling eigenvalue, float64.

    Each row's sign is fixed so that its entry of largest magnitude is positive: two runs agree.
    """
    vectors = torch.linalg.eigh(gram.double()).eigenvectors.flip(1).T
    pivot = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * pivot.sign()


def default_backward(model: nn.Module, batch: Mapping[str, object]) -> None:
    """One forward and backward of a transformers model whose batch holds its labels."""
    model(**batch).loss.backward()


def calibrate(
    model: nn.Module,
    layers: Mapping[str, Sequence[str]],
    batches: Iterable[object],
    backward: Callable[[nn.Module, object], None] = default_backward,
) -> dict[str, TransitionMatrices]:
    """The transition matrices of each kind of layer (the paper's preliminary phase); the model is left as it was.

    Everything but the named layers is frozen meanwhile. Each weight gradient is consumed inside backward, as soon as
    it exists, and freed: at no time do two layers' gradients live. Parameters' `.grad` must be None.

    Args:
        model: any model; its mode (train or eval) is not touched.
        layers: kind -> names of the linear layers of that kind, as `find_layers` gives them.
        batches: what `backward` takes, one per step (the paper: 30); consumed one at a time.
        backward: runs forward and backward once.

    Raises:
        SparseGradError: a name is no linear layer, layers of a kind differ in shape, a gradient is not finite, or no
            gradient arrives.
    """
    shapes = checked_shapes(model, layers)
    decomposition: dict[str, StreamingHOSVD] = {}
    for kind, names in layers.items():
        weight = model.get_submodule(names[0]).weight
        decomposition[kind] = StreamingHOSVD(*shapes[kind], dtype=weight.dtype, device=weight.device)

    with _only_trainable(model, [model.get_submodule(n).weight for names in layers.values() for n in names]):
        hooks = []
        try:
            for kind, names in layers.items():
                for name in names:
                    layer = model.get_submodule(name)
                    consume = _consumer(decomposition[kind], name, transposed=is_transposed(layer))
                    hooks.append(layer.weight.register_post_accumulate_grad_hook(consume))
            for batch in batches:
                backward(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
    result = {}
    for kind, names in layers.items():
        # Popped so that a kind's Gram matrices are freed before the next kind's are decomposed.
        result[kind] = decomposition.pop(kind).transition_matrices(model.get_submodule(names[0]).weight.dtype)
    return result


def _consumer(hosvd: StreamingHOSVD, name: str, transposed: bool) -> Callable[[Tensor], None]:
    def consume(weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        try:
            hosvd.update(gradient.T if transposed else gradient)
        except SparseGradError as error:
            raise SparseGradError(f"layer {name!r}: {error}") from None

    return consume


@contextmanager
def _only_trainable(model: nn.Module, trainable: Sequence[Tensor]) -> Iterator[None]:
    """Only these parameters require gradients inside; flags come back, and no gradient stays, whatever happens."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    if any(parameter.grad is not None for parameter, _ in before):
        raise SparseGradError("the model holds gradients; call zero_grad(set_to_none=True) before preparing")
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
            parameter.grad = None
