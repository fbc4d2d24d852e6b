"""Under torch.autocast the layers here do what `torch.nn.Linear` does: products in its dtype, gradients in their own.

Autocast casts the arguments of the operations that it knows, forward alone, and of an autograd function's backward it
knows nothing. So functions are told apart from it: what a linear layer would cast is cast once, before forward, and
kept for backward in place of the original, as a linear layer keeps its copies. What a function has besides (adapters,
transition matrices) it casts itself, where it is used, to the dtype of X or dL/dY: no copy of it is kept.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# The arguments of a forward that a linear layer has too.
CAST = ("x", "weight", "bias")


def like_linear(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """A class decorator: under autocast forward gets its arguments named in `CAST` in autocast's dtype, autocast off.

    Backward runs in that dtype, and the gradients of those arguments are returned in the dtype that they came in, of a
    COO gradient the values. Without autocast nothing is done, and nothing to float64, which autocast leaves alone too.
    Of a subclass that has a backward of its own alone, that one is decorated.
    """
    if "forward" in vars(function):
        function.forward = staticmethod(_cast_before(function.forward))
    if "backward" in vars(function):
        function.backward = staticmethod(_cast_after(function.backward))
    return function


def _cast_before(forward):
    names = list(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def cast(ctx, *args):
        device = args[0].device.type
        ctx.came_in = None
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return forward(ctx, *args)
        dtype = torch.get_autocast_dtype(device)
        cast = [name in CAST and _is_cast(arg) for name, arg in zip(names, args, strict=True)]
        ctx.came_in = [arg.dtype if of else None for arg, of in zip(args, cast, strict=True)]
        with torch.autocast(device, enabled=False):
            return forward(ctx, *(arg.to(dtype) if of else arg for arg, of in zip(args, cast, strict=True)))

    return cast


def _is_cast(argument: object) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point() and argument.dtype != torch.float64


def _cast_after(backward):
    @functools.wraps(backward)
    def cast(ctx, dy):
        if ctx.came_in is None:
            return backward(ctx, dy)
        with torch.autocast(dy.device.type, enabled=False):
            gradients = list(backward(ctx, dy))
        return _returned(gradients, ctx.came_in)

    return cast


def _returned(gradients: list[Tensor | None], dtypes: Sequence[torch.dtype | None]) -> tuple[Tensor | None, ...]:
    """The gradients in these dtypes; each is let go before the next is cast."""
    for n, dtype in enumerate(dtypes):
        if gradients[n] is not None and dtype is not None:
            gradients[n] = _to(gradients[n], dtype)
    return tuple(gradients)


def _to(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    if gradient.layout != torch.sparse_coo:
        return gradient.to(dtype)
    indices, values = gradient._indices(), gradient._values().to(dtype)
    return torch.sparse_coo_tensor(
        indices, values, gradient.shape, is_coalesced=gradient.is_coalesced(), check_invariants=False
    )


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast off, on a device that has it."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def cast_to(matrix: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The matrix in the dtype, itself where it has it; None stays None."""
    return None if matrix is None else matrix.to(dtype)
