"""The predictions that every change is compared with: `python -m benchmarks.tracked --json PATH`, or `make compare`.

They follow from the code and the versions of torch and transformers alone, so that a byte that moves was moved by a
change. `benchmarks/reference/records.json` holds them; `make reference` makes it anew.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import MappingProxyType

from baselines.registry import CORE
from benchmarks.collect import say
from benchmarks.harness.plan import plan
from benchmarks.harness.predict import predict
from benchmarks.harness.spec import RunSpec
from benchmarks.matrix import EQUAL_TRAINABLE
from reports.record import Record, write

# On the models those whose steps go through different code: all thirteen would take minutes.
ON_MODELS = ("full", "lora", "meprop-weight", "sparsegrad", "sparsegrad-core")
# The two kinds of memory, regimes, dtypes and whole models, by what two cores predict in half a minute.
CASES: tuple[tuple[Sequence[str], Mapping[str, object]], ...] = tuple(
    (methods, MappingProxyType(workload))
    for methods, workload in (
        (ON_MODELS, {"model": "minilm-l6", "batch": 16, "seq": 64, "device": "cpu"}),
        (CORE, {"layer": (768, 3072), "batch": 4, "seq": 128, "dtype": "bfloat16", "device": "cpu"}),
        (CORE, {"block": (384, 1536), "batch": 4, "seq": 128, "device": "cuda"}),
        (ON_MODELS, {"model": "roberta-base", "batch": 8, "seq": 128, "device": "cuda", "train_rest": "none"}),
    )
)
PROCESSES = 2


def specs() -> list[RunSpec]:
    """All tracked predictions."""
    found = []
    for methods, workload in CASES:
        impl = "foreach" if workload["device"] == "cuda" else "for-loop"
        found += plan(",".join(methods), EQUAL_TRAINABLE, **workload, optimizer_impl=impl, rounds=0)
    return found


def tracked() -> list[Record]:
    """The record of each."""
    # Not forked: torch's threads would not be there.
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(predict, specs()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the records."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tracked", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, required=True, metavar="PATH")
    path = parser.parse_args(arguments).json
    records = tracked()
    write(records, path)
    say(f"{len(records)} predictions in {path}")


if __name__ == "__main__":
    main()
