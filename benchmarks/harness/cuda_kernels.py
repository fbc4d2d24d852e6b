"""What CUDA's kernels allocate otherwise than the CPU's, cause by cause, for fake CPU tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from benchmarks.harness.cards import Card

aten = torch.ops.aten
See = Callable[[object], None]


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:
    if not train or not p or not input.numel():
        return input
    if p == 1:
        return input * input.new_zeros(())
    return torch.native_dropout(input, p, True)[0]


def _softmax(kernel, input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    if input.dtype == torch.half and dtype == torch.float32:
        return kernel(input, dim, True)
    return kernel(input if dtype is None else input.to(dtype), dim, False)


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    out, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale
    )
    return out


class Unmodelled(ValueError):
    """An operation that a CUDA card would not run in this way."""


class CudaKernels:
    def __init__(self, card: Card):
        self._card = card
        self._workspaces: dict[bool, Tensor] = {}
        self._attention_kernels: list[str] = []

    @contextmanager
    def functions(self):
        """Functions above autograd that are made of other operations on CUDA than on the CPU."""
        with torch.library._scoped_library("aten", "IMPL") as library:
            library.impl("dropout", _dropout, "AutogradCPU")
            library.impl("softmax.int", partial(_softmax, aten._softmax), "AutogradCPU")
            library.impl("log_softmax.int", partial(_softmax, aten._log_softmax), "AutogradCPU")
            library.impl("scaled_dot_product_attention", _attention, "AutogradCPU")
            yield

    @property
    def attention_kernel(self) -> str | None:
        return ", ".join(self._attention_kernels) or None

    def __call__(self, func, args, kwargs, see: See) -> object:
        if func in MATRIX_PRODUCTS:
            in_backward = torch._C._current_autograd_node() is not None
            if in_backward not in self._workspaces:
                self._workspaces[in_backward] = torch.empty(8_519_680, dtype=torch.uint8)
                see(self._workspaces[in_backward])
        kernel = _KERNELS.get(func)
        return func(*args, **kwargs) if kernel is None else kernel(func, args, kwargs, see)


def _on_host(func, args, kwargs, see):
    result = func(*args, **kwargs)
    if isinstance(result, FakeTensor):
        result.untyped_storage().on_host = True
    return result


def _softmax_backward(func, args, kwargs, see):
    result = func(*args, **kwargs)
    see(result)
    see(torch.empty_like(args[0]))
    return result


MATRIX_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
_KERNELS = {
    aten.lift_fresh.default: _on_host,
    aten._softmax_backward_data.default: _softmax_backward,
}
