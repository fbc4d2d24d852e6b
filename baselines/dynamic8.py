"""The 8-bit dynamic data type (Dettmers, ICLR 2016, arXiv 1511.04561), as bitsandbytes has it.

A power of ten from 1e-6 to 1, whose number of leading zero bits stands for it, and the bits that are left for a linear
fraction between 0.1 and 1: the middles of its intervals. Besides, 0 and 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dynamic_table(signed: bool = True) -> Tensor:
    """The 256 values (256,) in float32, ascending: of either sign, or from 0 on with a bit more for the fraction."""
    found = [0.0, 1.0]
    signs = (1, -1) if signed else (1,)
    for bits in range(7):
        intervals = 2**bits if signed else 2 ** (bits + 1)
        width = 0.9 / intervals
        for n in range(intervals):
            found += [sign * 10.0 ** (bits - 6) * (0.1 + (n + 0.5) * width) for sign in signs]
    return torch.tensor(sorted(found), dtype=torch.float64).float()


def middles(table: Tensor) -> Tensor:
    """(n,) ascending -> (n - 1,): `torch.bucketize` by them gives the index of the value nearest to an entry."""
    return (table[1:] + table[:-1]) / 2
