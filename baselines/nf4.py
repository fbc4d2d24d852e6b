"""4-bit NormalFloat with double quantization, the storage of QLoRA (Dettmers et al., NeurIPS 2023, arXiv 2305.14314).

An entry is one of the 16 values of `normal_float_table`, times the largest magnitude of its block of 64 entries
(section 3, "4-bit NormalFloat Quantization"). These magnitudes are stored in 8 bits themselves ("Double Quantization"):
less their mean, as one of the 256 values of `dynamic_table`, times the largest magnitude in 256 of them. That makes
1/2 + 1/64 + 4/(64 * 256) bytes an entry, and 4 for the mean: the layout of bitsandbytes' `quantize_4bit` with `nf4`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from baselines.dynamic8 import dynamic_table, middles

BLOCK, MAGNITUDES = 64, 256  # entries that share a magnitude, magnitudes that share a scale
# The quantile of the outermost value, so that the tails of N(0, 1) are cut as far out on either side: the reference
# implementation's, half way between 1 - 1/(2 * 15) and 1 - 1/(2 * 16).
OUTERMOST = 0.5 * ((1 - 1 / 30) + (1 - 1 / 32))
# A weight is quantized, and made dense, in so many parts: what is temporary is a part's. More are slower.
PARTS = 4


def normal_float_table() -> Tensor:
    """The 16 values (16,) of NF4 in float32, ascending from -1 to 1: quantiles of N(0, 1), and an exact zero."""

    def half(count: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, count + 1, dtype=torch.float64)[:-1])

    # One more above zero than below: 16 values cannot be symmetric and have a zero.
    above, below = half(8), half(7)
    table = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
    return (table / above[0]).float()


@dataclass(frozen=True)
class Tables:
    """What all quantized weights share: the values of either data type, and those of a byte's two codes (256, 2)."""

    normal: Tensor
    dynamic: Tensor
    pairs: Tensor

    @classmethod
    def made(cls, device: torch.device) -> Tables:
        """On a device; of the code in the four high bits the value comes first."""
        normal = normal_float_table().to(device)
        pairs = torch.stack([normal.repeat_interleave(16), normal.repeat(16)], 1)
        return cls(normal, dynamic_table().to(device), pairs)

    def tensors(self) -> tuple[Tensor, ...]:
        """All three."""
        return self.normal, self.dynamic, self.pairs


def stored_bytes(entries: int) -> int:
    """Bytes of a quantized weight of so many entries, without the tables."""
    blocks = math.ceil(entries / BLOCK)
    return math.ceil(entries / 2) + blocks + 4 * math.ceil(blocks / MAGNITUDES) + 4


@torch.no_grad()
def quantize(weight: Tensor, tables: Tables) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Any floating tensor -> codes (ceil(n / 2),) and magnitudes (blocks,) uint8, scales and mean () float32.

    Entries are taken row by row, and each becomes the nearest value; what the last block lacks counts as zeros.
    """
    flat = weight.reshape(-1)
    blocks = math.ceil(flat.numel() / BLOCK)
    codes = torch.empty(math.ceil(flat.numel() / 2), dtype=torch.uint8, device=weight.device)
    largest = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    between = middles(tables.normal)
    for begin, end in _parts(blocks):
        part = flat[begin * BLOCK : end * BLOCK].float()
        part = F.pad(part, (0, (end - begin) * BLOCK - part.numel())).view(-1, BLOCK)
        of_blocks = part.abs().amax(1)
        largest[begin:end] = of_blocks
        # A block of zeros stays one.
        scaled = part / of_blocks.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
        found = torch.bucketize(scaled, between, out_int32=True).to(torch.uint8).view(-1, 2)
        packed = found[:, 0] * 16 + found[:, 1]
        held = codes[begin * BLOCK // 2 : end * BLOCK // 2]
        held.copy_(packed[: held.numel()])
    mean = largest.mean()
    rest = F.pad(largest - mean, (0, -blocks % MAGNITUDES)).view(-1, MAGNITUDES)
    scales = rest.abs().amax(1)
    scaled = rest / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    magnitudes = torch.bucketize(scaled, middles(tables.dynamic), out_int32=True).to(torch.uint8)
    magnitudes = magnitudes.view(-1)[:blocks].clone()
    return codes, magnitudes, scales, mean


@torch.no_grad()
def dequantize(stored: Sequence[Tensor], tables: Tables, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What `quantize` gave -> the weight, of `shape`, each entry rounded once from float32 to `dtype`."""
    codes, magnitudes, scales, mean = stored
    entries, blocks = math.prod(shape), magnitudes.numel()
    largest = tables.dynamic.index_select(0, magnitudes.int())
    largest = F.pad(largest, (0, -blocks % MAGNITUDES)).view(-1, MAGNITUDES).mul_(scales.unsqueeze(1)).add_(mean)
    largest = largest.view(-1, 1)
    weight = torch.empty(entries, dtype=dtype, device=codes.device)
    for begin, end in _parts(blocks):
        packed = codes[begin * BLOCK // 2 : end * BLOCK // 2]
        part = tables.pairs.index_select(0, packed.int()).view(-1)
        held = weight[begin * BLOCK : end * BLOCK]
        part = F.pad(part, (0, (end - begin) * BLOCK - part.numel())).view(-1, BLOCK).mul_(largest[begin:end])
        held.copy_(part.view(-1)[: held.numel()])
    return weight.view(shape)


def _parts(blocks: int) -> Iterator[tuple[int, int]]:
    """Where parts of whole blocks begin and end."""
    step = max(1, math.ceil(blocks / PARTS))
    for begin in range(0, blocks, step):
        yield begin, min(begin + step, blocks)
