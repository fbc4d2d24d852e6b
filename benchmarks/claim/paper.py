"""The paper's own memory figures, and what arithmetic alone says of them. Data: benchmarks/reference/paper/."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from statistics import mean
from types import MappingProxyType

from reports.record import Record

TABLES = Path(__file__).parent.parent / "reference" / "paper"
CLAIM = "with identical memory requirements, our method outperforms LoRA and MeProp"
SOURCE = "Chekalina et al., SparseGrad, EMNLP 2024, arXiv 2410.07383"
# The paper's names of what the suite calls full, lora and sparsegrad.
NAMES = MappingProxyType({"full": "regular_ft", "lora": "lora", "sparsegrad": "sparsegrad_sparse_by_dense"})
# Two ratios agree where they are no further apart than this.
AGREEMENT = 0.02
FLOAT32 = 4


@cache
def table(name: str) -> tuple[Mapping[str, str], ...]:
    """The rows of `<name>.csv`, as text."""
    with (TABLES / f"{name}.csv").open(newline="", encoding="utf-8") as stream:
        return tuple(csv.DictReader(stream))


def memory_mb(method: str) -> float:
    """Table 3: the memory of RoBERTa-base with `full`, `lora` or `sparsegrad`, MB."""
    return float(next(row["memory_mb"] for row in table("table3") if row["method"] == NAMES[method]))


def ratios() -> dict[str, float]:
    """Table 3's ratios of memory."""
    full, lora, sparsegrad = (memory_mb(name) for name in NAMES)
    return {"lora/full": lora / full, "sparsegrad/full": sparsegrad / full, "sparsegrad/lora": sparsegrad / lora}


def by_batch() -> dict[int, dict[str, float]]:
    """Table 8's memory of RoBERTa-base, MB, as means over the tasks of each batch size: batch -> method -> mean."""
    sizes = {row["task"]: int(row["batch_size"]) for row in table("table13_15") if row["model"] == "roberta_base"}
    rows = {row["method"]: row for row in table("table8")}
    return {
        size: {
            method: mean(float(rows[name][task]) for task in sizes if sizes[task] == size)
            for method, name in NAMES.items()
        }
        for size in sorted(set(sizes.values()))
    }


def reproduced(found: Mapping[str, float | None]) -> bool | None:
    """Whether ratios agree with the paper's, all of them; None where one is missing."""
    if any(value is None for value in found.values()):
        return None
    return all(abs(value / ratios()[name] - 1) <= AGREEMENT for name, value in found.items())


def floors(full: Record) -> list[tuple[str, int]]:
    """What full fine-tuning with Adam in float32 cannot do without, bytes: at rest, and when gradients exist too."""
    size = FLOAT32 * full.total_params
    return [
        ("weights", size),
        ("weights and Adam's two moments: between any two steps", 3 * size),
        ("weights, gradients and moments: within a step, before any activation", 4 * size),
    ]


def counted(full: Record, lora: Record, sparsegrad: Record) -> dict[str, dict[str, int]]:
    """Bytes of weights, bases and moments alone, in float32, counted from the records' parameters.

    Once with SparseAdam's moments as torch stores them, which is dense, and once as if they existed for the kept
    entries alone: as -> method -> bytes.
    """
    rest = lora.trainable_params - lora.budget_params
    targets = full.total_params - rest
    weights = FLOAT32 * full.total_params
    shared = {
        "full": 3 * weights,
        "lora": weights + FLOAT32 * (3 * lora.budget_params + 2 * rest),
    }
    based = weights + sparsegrad.basis_bytes + FLOAT32 * 2 * rest
    return {
        "dense moments": {**shared, "sparsegrad": based + FLOAT32 * 2 * targets},
        "moments of the kept entries": {**shared, "sparsegrad": based + FLOAT32 * 2 * sparsegrad.budget_params},
    }
