"""What a reduction allocates on a card for the partial results of its thread blocks.

Where a sum has few outputs and many terms, PyTorch's kernel (`gpu_reduce_kernel`, ATen/native/cuda/Reduce.cuh as
PyTorch 2.13 installs it) splits the terms of each output over several thread blocks, which leave what they have in
global memory. Down the rows of a matrix that is one number for every THREAD of a block, not one for the block: a bias
gradient of 4096 tokens x 3072 features in float32 takes 96 MiB for a result of 12 KiB. How far it splits follows from
the shape, the strides and the number of the card's multiprocessors.

Left out: tensors of 2^31 elements or more, which are reduced piece by piece.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from benchmarks.harness.cards import Card

WARP = 32
THREADS_PER_BLOCK = 512
OUTPUTS_PER_LOAD = 4  # at most, where neighbours in memory belong to different outputs
INPUTS_PER_LOAD = 4  # where they belong to the same
# Terms of a thread: a block's warps share an output's from so many a warp on, blocks share them from the second on,
# and then so many are left to each.
SHARED_BY_WARPS, SHARED_BY_BLOCKS, LEAST_LEFT = 16, 256, 16


def partial_results_bytes(
    card: Card, shape: Sequence[int], strides: Sequence[int], dims: Collection[int], accumulator_bytes: int
) -> list[int]:
    """The sizes of the buffers of a reduction of (shape, strides in elements) over `dims`: results, then semaphores.

    Empty where the thread blocks share nothing. `accumulator_bytes` is the size of what a thread adds up in.
    """
    lines = [(stride, size, i in dims) for i, (size, stride) in enumerate(zip(shape, strides, strict=True)) if size > 1]
    reduced = _joined((stride, size) for stride, size, is_reduced in lines if is_reduced)
    kept = _joined((stride, size) for stride, size, is_reduced in lines if not is_reduced)
    terms, outputs = (math.prod(size for _, size in group) for group in (reduced, kept))
    if not reduced or not terms or not outputs:
        return []
    # Whether neighbours in memory belong to the same output: a block's row of threads then shares it.
    along = not kept or reduced[0][0] < kept[0][0]
    fastest = (reduced if along else kept)[0][0]
    columns, rows = (terms, outputs) if along else (outputs, terms)
    per_load = 1
    if fastest == 1 and along and columns >= 128 and len(reduced) == 1:
        columns //= INPUTS_PER_LOAD
    elif fastest == 1 and not along:
        steps = [kept[0][1], *(stride for stride, _ in (*reduced, *kept[1:]))]
        per_load = next(n for n in (OUTPUTS_PER_LOAD, 2, 1) if all(step % n == 0 for step in steps))
        columns //= per_load
    width, height = _block(columns, rows, THREADS_PER_BLOCK // per_load)

    sharing = width if along else 1  # threads that share an output
    apart = 1 if along else width
    if _up(terms, sharing) < min(height * SHARED_BY_WARPS, SHARED_BY_BLOCKS):
        return []
    sharing *= height
    left = _up(terms, sharing)
    blocks = _up(outputs // per_load, apart)
    room = card.multiprocessors * (card.threads_per_multiprocessor // (width * height))
    if left < SHARED_BY_BLOCKS or blocks > room:
        return []
    split = max(min(_up(room, blocks), _up(left, LEAST_LEFT)), _up(left, SHARED_BY_BLOCKS))
    if split == 1:
        return []
    return [accumulator_bytes * outputs * split * (1 if along else width * per_load), 4 * blocks]


def _joined(lines) -> list[tuple[int, int]]:
    """(stride, size) by rising stride, neighbours that make one line joined."""
    found: list[tuple[int, int]] = []
    for stride, size in sorted(lines):
        if found and found[-1][0] * found[-1][1] == stride:
            found[-1] = found[-1][0], found[-1][1] * size
        else:
            found.append((stride, size))
    return found


def _block(columns: int, rows: int, most: int) -> tuple[int, int]:
    """Width and height of a thread block, powers of two with at most `most` threads: a warp in width first."""
    wide, high = (min(1 << (max(1, n).bit_length() - 1), most) for n in (columns, rows))
    height = min(high, most // min(wide, WARP))
    return min(wide, most // height), height


def _up(a: int, b: int) -> int:
    return -(-a // b)
