"""The runs of which a card's own measurements are committed: `python -m benchmarks.on_card --json PATH`.

On a machine with an NVIDIA GPU it measures them (`--only` some of the groups), several at a time: the allocator's
figures are each process's own, and no step is timed. `--predict` predicts the same runs instead, on any machine.
`python -m benchmarks.validation` holds the predictions against the committed measurements.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from baselines.registry import CORE, methods
from benchmarks.claim.predictor import Predictor
from benchmarks.collect import check_destination, collect, say
from benchmarks.harness.errors import InputError
from benchmarks.harness.plan import plan
from benchmarks.harness.spec import RunSpec
from benchmarks.harness.turns import Done, measure_all
from reports.record import Record, read

GPU = "h100"
GIB = 2**30
# Of each method some code of its own runs in these.
FEW = ("full", "lora", "sparsegrad")
SOME = ("full", "lora", "meprop-weight", "sparsegrad", "sparsegrad-core", "sparsegrad-directions")
OTHERS = tuple(name for name in methods() if name not in CORE)
# Bases of 10 passes are as large as those of 30.
CALIBRATION_STEPS = 10

ROBERTA_BASE = {"model": "roberta-base", "batch": 32, "seq": 128}
ROBERTA_LARGE = {"model": "roberta-large", "batch": 32, "seq": 128}
DECODER = {"batch": 1, "seq": 512, "dtype": "bfloat16", "train_rest": "none"}
SMALL_LLAMA = {"model": "tinyllama-1.1b", "targets": "mlp/11", **DECODER}

EDGE_BYTES = 16 * GIB
EDGES: Sequence[tuple[str, Mapping[str, object], Mapping[str, int]]] = (
    ("lora[7]", ROBERTA_BASE, {"full": 182, "lora": 188, "sparsegrad": 181}),
    ("lora[10]", ROBERTA_LARGE, {"lora": 64, "sparsegrad": 56, "sparsegrad-core": 76}),
    ("lora[7]", SMALL_LLAMA, {"lora": 15, "sparsegrad": 13}),
)

# Group -> methods, the reference that sets their budgets, and the fields of `RunSpec` in which its runs differ.
GROUPS: Mapping[str, Sequence[tuple[Sequence[str], str, Mapping[str, object]]]] = MappingProxyType(
    {
        "layers": (
            (CORE, "lora[7]", {"layer": (4096, 11008), "batch": 4, "seq": 128}),
            (CORE, "lora[7]", {"block": (768, 3072), "batch": 4, "seq": 128}),
            (CORE, "lora[7]", {"block": (1024, 4096), "batch": 4, "seq": 512, "dtype": "bfloat16"}),
            (SOME, "lora[7]", {"block": (384, 1536), "batch": 4, "seq": 128}),
        ),
        "encoders": (
            ((*CORE, *OTHERS, "peft:lora"), "lora[7]", ROBERTA_BASE),
            (SOME, "lora[7]", {**ROBERTA_BASE, "train_rest": "none"}),
            (SOME, "lora[7]", {**ROBERTA_BASE, "attention": "eager"}),
            (CORE, "lora[7]", {"model": "bert-base", "batch": 32, "seq": 128}),
            (("sparsegrad-folded", "sparsegrad-compact", "sparsegrad-fixed", *SOME), "lora[10]", ROBERTA_LARGE),
        ),
        "decoders": (
            (SOME, "lora[7]", SMALL_LLAMA),
            (FEW, "lora[7]", {**SMALL_LLAMA, "attention": "eager"}),
            (("lora",), "lora[7]", {**SMALL_LLAMA, "attention": "sdpa-flash"}),
            (("lora",), "lora[7]", {**SMALL_LLAMA, "attention": "sdpa-efficient"}),
            (("full", "lora", "sparsegrad-core"), "lora[7]", {"model": "gpt2", "batch": 4, "seq": 256}),
        ),
        "large": (
            (
                ("lora", "sparsegrad", "sparsegrad-core"),
                "lora[32]",
                {"model": "llama-2-7b", "targets": "mlp/3", **DECODER},
            ),
        ),
        "modifiers": (
            *(
                (FEW, "lora[7]", {**ROBERTA_BASE, **modifier})
                for modifier in (
                    {"dtype": "bfloat16"},
                    {"dtype": "bf16-mixed"},
                    {"checkpointing": True},
                    {"optimizer": "sgd"},
                    {"optimizer_impl": "fused"},
                )
            ),
            (("full", "lora"), "lora[7]", {**ROBERTA_BASE, "accumulate": 4}),
            (("full", "lora"), "lora[7]", {**ROBERTA_BASE, "optimizer": "adamw8bit", "optimizer_impl": "for-loop"}),
        ),
        # The largest batch that is predicted to fit in so much memory, and one more.
        "edges": tuple(
            ((method,), reference, {**workload, "batch": batch, "gpu_memory_bytes": EDGE_BYTES})
            for reference, workload, largest in EDGES
            for method, most in largest.items()
            for batch in (most, most + 1)
        ),
    }
)


def specs(groups: Sequence[str] = tuple(GROUPS), gpu: str | None = None) -> list[RunSpec]:
    """All runs of the groups; for a prediction with the card's name."""
    if unknown := [group for group in groups if group not in GROUPS]:
        raise InputError(f"there is no group {unknown[0]!r}: choose among {', '.join(GROUPS)}")
    found = []
    for group in groups:
        for names, reference, workload in GROUPS[group]:
            common = {"optimizer_impl": "foreach", "calibration_steps": CALIBRATION_STEPS, **workload}
            found += plan(",".join(names), reference, device="cuda", gpu=gpu, rounds=0, **common)
    return found


class Room:
    """The card's memory, lent to runs that say how much they need."""

    def __init__(self, free_bytes: int):
        self._most = self._free = free_bytes
        self._changed = threading.Condition()

    @contextmanager
    def lent(self, needed_bytes: int):
        """Waits until there is as much."""
        needed = min(needed_bytes, self._most)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= needed)
            self._free -= needed
        try:
            yield
        finally:
            with self._changed:
                self._free += needed
                self._changed.notify_all()


def measure(wanted: Sequence[RunSpec], needs: Mapping[tuple, int], done: Done, jobs: int, card_bytes: int) -> None:
    """Measure each in a process of its own, `jobs` at a time as far as the card has room for what they need."""
    room, turn = Room(card_bytes), threading.Lock()

    def one(spec: RunSpec) -> None:
        def told(*result: object) -> None:
            with turn:
                done(*result)

        with room.lent(needs.get(identity(spec), spec.gpu_memory_bytes or 4 * GIB)):
            measure_all([replace(spec, threads=2)], None, lambda _, *rest: told(spec, *rest))

    with ThreadPoolExecutor(jobs) as threads:
        list(threads.map(one, wanted))


def identity(what: RunSpec | Record) -> tuple:
    """What a run and its prediction have in common."""
    record = what.blank(what.label()) if isinstance(what, RunSpec) else what
    names = ("model", "method", "budget", "batch", "seq", "dtype", "attention", "optimizer", "optimizer_impl")
    return tuple(getattr(record, name) for name in (*names, "train_rest", "targets", "checkpointing", "accumulate"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the records."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_card", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", required=True, metavar="PATH")
    parser.add_argument("--only", default=",".join(GROUPS), metavar="GROUP,GROUP", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time")
    parser.add_argument("--predict", action="store_true", help="predict the runs instead of measuring them")
    parser.add_argument("--needs", type=Path, metavar="PATH", help="records that say what each run needs of the card")
    parser.add_argument("--room", type=float, default=70.0, metavar="GIB", help="of the card's memory")
    parser.add_argument("--skip", type=Path, metavar="PATH", help="records of runs that are not measured again")
    chosen = parser.parse_args(arguments)
    check_destination(chosen.json)
    wanted = specs(chosen.only.split(","), GPU if chosen.predict else None)
    if chosen.predict:
        with Predictor(jobs=chosen.jobs) as predictor:

            def obtain(done: Done) -> None:
                predictor.each([lambda spec=spec: done(spec, predictor(spec), ()) for spec in wanted])

            collect(wanted, "predicted", obtain, chosen.json)
        return
    had = {identity(record) for record in read(chosen.skip) if record.status == "ok"} if chosen.skip else set()
    wanted = [spec for spec in wanted if identity(spec) not in had]
    if not wanted:
        say("nothing is left to measure")
        return
    known = read(chosen.needs) if chosen.needs else []
    needs = {
        identity(record): max(record.peak_reserved_bytes, record.peak_preparation_bytes) + GIB
        for record in known
        if record.status == "ok"
    }

    def obtain(done: Done) -> None:
        measure(
            wanted,
            needs,
            lambda spec, record, seconds: done(spec, replace(record, timeline=None), seconds),
            chosen.jobs,
            int(chosen.room * GIB),
        )

    collect(wanted, "measured", obtain, chosen.json)


if __name__ == "__main__":
    main()
