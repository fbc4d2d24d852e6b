"""The weight gradients of chosen layers as the two factors that make them, one layer at a time, inside backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from sparsegrad.errors import SparseGradError


def default_backward(model: nn.Module, batch: Mapping[str, object]) -> None:
    """One forward and backward of a transformers model whose batch holds its labels."""
    model(**batch).loss.backward()


def stream_gradients(
    model: nn.Module,
    layers: Mapping[str, Sequence[str]],
    batches: Iterable[object],
    backward: Callable[[nn.Module, object], None],
    consume: Callable[[str, str, Tensor, Tensor], None],
) -> None:
    """Call `consume(kind, name, dY, X)` for each named layer and batch: its weight gradient (D_out, D_in) is dY^T X.

    dY (T, D_out) is the gradient of the layer's output and X (T, D_in) its input, both in the weight's dtype; a layer
    that a forward uses several times has the tokens of all uses. It is called inside backward, before dL/dX exists, and
    X is kept no longer, as long as `consume` does not. Every parameter is frozen meanwhile, so that no weight gradient
    is made, and the model is left as it was. Parameters' `.grad` must be None.

    Raises `SparseGradError` where gradients are held already, and what `consume` raises, with the layer's name.
    """
    with _frozen(model):
        hooks = []
        try:
            for kind, names in layers.items():
                for name in names:
                    hooks.append(_watch(model.get_submodule(name), kind, name, consume))
            for batch in batches:
                backward(model, batch)
        finally:
            for hook in hooks:
                hook.remove()


def _watch(
    layer: nn.Module, kind: str, name: str, consume: Callable[[str, str, Tensor, Tensor], None]
) -> RemovableHandle:
    """A forward hook that makes backward call `consume` with the layer's factors."""
    uses: list[tuple[Tensor, Tensor]] = []
    # Autograd completes its gradient when that of every use of the layer is there, and then turns to it first.
    complete = layer.weight.new_empty(0).requires_grad_()

    def follow(layer: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())
        return _Watched.apply(y, x.detach(), complete, uses)

    def hand_over(complete: Tensor) -> None:
        complete.grad = None
        parts = [[f.reshape(-1, f.shape[-1]).to(complete.dtype) for f in factor] for factor in zip(*uses, strict=True)]
        uses.clear()
        dy, x = (part[0] if len(part) == 1 else torch.cat(part) for part in parts)
        try:
            consume(kind, name, dy, x)
        except SparseGradError as error:
            raise SparseGradError(f"layer {name!r}: {error}") from None

    complete.register_post_accumulate_grad_hook(hand_over)
    return layer.register_forward_hook(follow, with_kwargs=True)


class _Watched(torch.autograd.Function):
    """The identity of Y, whose backward adds (dL/dY, X) to `uses`."""

    @staticmethod
    def forward(ctx, y, x, complete, uses):
        """Y (..., D_out) itself, detached: what follows may then change it in place."""
        ctx.save_for_backward(x)
        ctx.uses = uses
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """dL/dY as it came, and a gradient without entries for `complete`."""
        ctx.uses.append((dy, *ctx.saved_tensors))
        return dy, None, dy.new_empty(0), None


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside; the flags come back, whatever happens."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    if any(parameter.grad is not None for parameter, _ in before):
        raise SparseGradError("the model holds gradients; call zero_grad(set_to_none=True) before preparing")
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
