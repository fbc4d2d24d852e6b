"""Graphics cards by name, as far as a prediction must know them: the compute capability decides which kernels run."""

from __future__ import annotations

import re
from dataclasses import dataclass

from benchmarks.harness.errors import InputError

# Compute capabilities as NVIDIA publishes them (developer.nvidia.com/cuda-gpus).
CAPABILITIES = {
    "v100": (7, 0),
    "t4": (7, 5),
    "rtx-2080-ti": (7, 5),
    "a100": (8, 0),
    "a30": (8, 0),
    "a10": (8, 6),
    "a10g": (8, 6),
    "a40": (8, 6),
    "rtx-3090": (8, 6),
    "rtx-a6000": (8, 6),
    "l4": (8, 9),
    "l40s": (8, 9),
    "rtx-4090": (8, 9),
    "h100": (9, 0),
    "h200": (9, 0),
    "b200": (10, 0),
    "rtx-5090": (12, 0),
}
DEFAULT = "9.0"


@dataclass(frozen=True)
class Card:
    """A kind of card: `capability` is (major, minor)."""

    name: str
    capability: tuple[int, int]


def card(name: str) -> Card:
    """The card of that name, or any card of a compute capability written X.Y. Raises `InputError`."""
    known = CAPABILITIES.get(name.lower())
    written = re.fullmatch(r"(\d{1,2})\.(\d)", name)
    if known is None and written is None:
        raise InputError(
            f"unknown card {name!r}: choose one of {', '.join(CAPABILITIES)}, or a compute capability such as {DEFAULT}"
        )
    found = Card(name.lower(), known or (int(written[1]), int(written[2])))
    if found.capability < (7, 0):
        raise InputError(f"cards before compute capability 7.0 run no current PyTorch, got {name}")
    return found
