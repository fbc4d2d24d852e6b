"""Which kernel computes `scaled_dot_product_attention` on a CUDA card, and the call of it on fake tensors.

The rule is that of PyTorch 2.13 (ATen/native/transformers/cuda/sdp_utils.cpp, read in a later revision, and the headers
that 2.13 installs): of the kernels in order, the first that is enabled (`torch.nn.attention.sdpa_kernel`) and that can
take the call.

 1. cudnn, on compute capabilities 9.x and 10.x alone (with the cuDNN that torch's builds for CUDA 13 bring): half or
    bfloat16, head size a multiple of 8 and at most 128, no gradient for the mask, dropout a multiple of 1/16.
 2. flash, from 8.0 on: half or bfloat16, no mask, a head size up to 256 (padded to a multiple of 8), as many queries
    as keys where it is causal. On 8.6, 8.9 and 12.x head sizes of 193 to 224, and above 224 with dropout, cannot train.
 3. efficient: half or float32, bfloat16 from 8.0 on; head sizes a multiple of 8 in half precision and, from 8.0 on, of
    4 in float32; no grouped K and V.
 4. math, which is matrix products and a softmax in float32, with the whole score matrix.

Grouped K and V (fewer heads than Q) are read in place by cudnn and flash; math repeats them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness.cards import Card

aten = torch.ops.aten
HALVES = (torch.float16, torch.bfloat16)
ALIGNMENT = 8  # elements: of a mask's strides, and of flash's head sizes


class NoKernel(ValueError):
    """No enabled kernel can take the call."""


def choose(
    card: Card,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    grouped: bool = False,
) -> str:
    """The kernel's name. q (B, H, L, D), k (B, H_kv, S, D), v (B, H_kv, S, D_v). Raises `NoKernel`."""
    refused = []
    for name, enabled, objection in (
        ("cudnn", torch.backends.cuda.cudnn_sdp_enabled, _cudnn_objects),
        ("flash", torch.backends.cuda.flash_sdp_enabled, _flash_objects),
        ("efficient", torch.backends.cuda.mem_efficient_sdp_enabled, _efficient_objects),
    ):
        if enabled():
            reason = objection(card, q, k, v, mask, dropout, causal, grouped)
            if reason is None:
                return name
            refused.append(f"{name} takes no {reason}")
    if torch.backends.cuda.math_sdp_enabled():
        return "math"
    raise NoKernel(f"no attention kernel that is allowed can run on {card.name}: {'; '.join(refused)}")


def _cudnn_objects(card, q, k, v, mask, dropout, causal, grouped) -> str | None:
    if card.capability[0] not in (9, 10):
        return f"compute capability {_written(card)} unless it is asked for"
    if q.dtype not in HALVES:
        return str(q.dtype)
    if any(t.shape[-1] % 8 or t.shape[-1] > 128 for t in (q, k, v)):
        return f"head size {q.shape[-1]}"
    if mask is not None and mask.requires_grad:
        return "mask that needs a gradient"
    if (dropout * 16) % 1:
        return f"dropout of {dropout:g}"
    if k.shape[2] == 1 or (q.shape[2] == 1 and dropout):
        return "single token"
    return None


def _flash_objects(card, q, k, v, mask, dropout, causal, grouped) -> str | None:
    head = q.shape[-1]
    if card.capability < (8, 0):
        return f"compute capability {_written(card)}"
    if q.dtype not in HALVES:
        return str(q.dtype)
    if mask is not None:
        return "mask"
    if head > 256 or not head == k.shape[-1] == v.shape[-1]:
        return f"head size {head}"
    small = card.capability in ((8, 6), (8, 9)) or card.capability[0] == 12
    if small and _trains(q, k, v) and (192 < head <= 224 or (head > 224 and dropout)):
        return f"training with head size {head} on compute capability {_written(card)}"
    if causal and q.shape[2] != k.shape[2]:
        return "causal call with other numbers of queries than keys"
    if 0 in (q.shape[2], k.shape[2]):
        return "empty sequence"
    return None


def _efficient_objects(card, q, k, v, mask, dropout, causal, grouped) -> str | None:
    tensor_cores = card.capability >= (8, 0)
    if q.dtype not in (torch.float16, torch.float32) and not (q.dtype == torch.bfloat16 and tensor_cores):
        return f"{q.dtype} on compute capability {_written(card)}"
    multiple = 8 if q.dtype in HALVES else 4 if tensor_cores else 1
    if q.shape[-1] != k.shape[-1] or any(t.shape[-1] % multiple for t in (q, v)):
        return f"head size {q.shape[-1]}"
    if grouped and q.shape[1] != k.shape[1]:
        return "grouped keys and values"
    if mask is not None and mask.stride(-1) != 1:
        return "mask whose last stride is not 1"
    return None


def _trains(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _written(card: Card) -> str:
    return ".".join(map(str, card.capability))


def attend(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
) -> Tensor:
    """Y (B, H, L, D_v) by the named kernel, with what torch does before and after it."""
    if mask is not None and mask.dtype == torch.bool:
        zero, least = (torch.full((), value, dtype=q.dtype) for value in (0.0, -torch.inf))
        mask = torch.where(mask, zero, least)
    trains = _trains(q, k, v)
    if kernel == "flash":
        head = q.shape[-1]
        scale = head**-0.5 if scale is None else scale
        if missing := -head % ALIGNMENT:
            q, k, v = (F.pad(tensor, (0, missing)) for tensor in (q, k, v))
        out = aten._scaled_dot_product_flash_attention(q, k, v, dropout, causal, scale=scale)[0]
        return out[..., :head] if missing else out
    if kernel == "cudnn":
        mask = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
        return aten._scaled_dot_product_cudnn_attention(q, k, v, mask, trains, dropout, causal, False, scale=scale)[0]
    if kernel == "efficient":
        mask = None if mask is None else _aligned(mask).expand(*q.shape[:3], k.shape[2])
        return aten._scaled_dot_product_efficient_attention(q, k, v, mask, trains, dropout, causal, scale=scale)[0]
    return aten._scaled_dot_product_attention_math(
        q, k, v, mask, dropout, causal, None, scale=scale, enable_gqa=grouped
    )[0]


def _aligned(mask: Tensor) -> Tensor:
    """The mask, padded where its rows do not begin at multiples of 8 elements."""
    if all(stride % ALIGNMENT == 0 for stride in mask.stride()[:-1]):
        return mask
    length = mask.shape[-1]
    return F.pad(mask, (0, ALIGNMENT - length % ALIGNMENT))[..., :length]
