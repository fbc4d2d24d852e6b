"""Graphics cards by name, as far as a prediction must know them.

The compute capability decides which kernels run, the number of multiprocessors how far they split their work.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from benchmarks.harness.errors import InputError


@dataclass(frozen=True)
class Card:
    """A kind of card: `capability` is (major, minor)."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int

    @property
    def threads_per_multiprocessor(self) -> int:
        """How many threads are resident on one at most."""
        return THREADS.get(self.capability, THREADS.get(self.capability[:1], 2048))


# Where it is not 2048 (CUDA C++ Programming Guide, technical specifications per compute capability).
THREADS = {(7, 5): 1024, (8, 6): 1536, (8, 7): 1536, (8, 9): 1536, (12,): 1536}
# Compute capabilities as NVIDIA publishes them (developer.nvidia.com/cuda-gpus), and streaming multiprocessors by its
# data sheets.
CARDS = {
    name: Card(name, capability, multiprocessors)
    for name, capability, multiprocessors in (
        ("v100", (7, 0), 80),
        ("t4", (7, 5), 40),
        ("rtx-2080-ti", (7, 5), 68),
        ("a100", (8, 0), 108),
        ("a30", (8, 0), 56),
        ("a10", (8, 6), 72),
        ("a10g", (8, 6), 80),
        ("a40", (8, 6), 84),
        ("rtx-3090", (8, 6), 82),
        ("rtx-a6000", (8, 6), 84),
        ("l4", (8, 9), 58),
        ("l40s", (8, 9), 142),
        ("rtx-4090", (8, 9), 128),
        ("h100", (9, 0), 132),
        ("h200", (9, 0), 132),
        ("b200", (10, 0), 148),
        ("rtx-5090", (12, 0), 170),
    )
}
# Of a card that only its compute capability tells of: nearly an H100's. It moves some buffers of reductions alone.
USUAL_MULTIPROCESSORS = 128
DEFAULT = "9.0"


def card(name: str) -> Card:
    """The card of that name, or any card of a compute capability written X.Y. Raises `InputError`."""
    found = CARDS.get(name.lower())
    if found is not None:
        return found
    written = re.fullmatch(r"(\d{1,2})\.(\d)", name)
    if written is None:
        raise InputError(
            f"unknown card {name!r}: choose one of {', '.join(CARDS)}, or a compute capability such as {DEFAULT}"
        )
    capability = int(written[1]), int(written[2])
    if capability < (7, 0):
        raise InputError(f"cards before compute capability 7.0 run no current PyTorch, got {name}")
    like = (card.multiprocessors for card in CARDS.values() if card.capability == capability)
    return Card(name, capability, max(like, default=USUAL_MULTIPROCESSORS))
