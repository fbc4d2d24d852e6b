"""Do forms of SparseGrad need less memory than LoRA, parameters being equal? `python -m benchmarks.promise`.

One line for each case and form, its bytes divided by those of our own LoRA on the same case: predicted, with the CPU's
semantics (which equal a measured run's to the byte) unless `--device cuda` asks for a card's. A target that is missed
is printed as missed; none is left out. Where a step that trains nothing (`head`, on blocks) already takes more than the
target, no method can meet it, and the line says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.harness.plan import plan
from benchmarks.harness.predict import SEMANTICS, predict
from reports.record import Record

REFERENCE = "lora[7]"
# On blocks it trains nothing and only hands dL/dX on: what is live then is live with every method.
LEAST = "head"
FORMS = (
    "sparsegrad",
    "sparsegrad-folded",
    "sparsegrad-compact",
    "sparsegrad-fixed",
    "sparsegrad-core",
    "sparsegrad-directions",
)

# What is promised of a form, at most: (metric, form) -> ratio to LoRA. None stands for the best form of a case.
ON_MODELS = {
    ("peak_step_bytes", None): 1.0,
    ("resident_bytes", "sparsegrad-fixed"): 1.03,
    ("resident_bytes", "sparsegrad-core"): 1.02,
    ("resident_bytes", "sparsegrad-directions"): 1.02,
}
ON_BLOCKS = {("peak_step_bytes", None): 0.95}
# Of every form, to its own `peak_step_bytes`.
MOST_PREPARATION = 1.25


@dataclass(frozen=True)
class Case:
    """A workload, as fields of `RunSpec`, and what is promised of it."""

    workload: Mapping[str, object]
    promised: Mapping[tuple[str, str | None], float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The case in words."""
        facts = dict(self.workload)
        name = facts.pop("model", None) or "block " + "x".join(map(str, facts.pop("block")))
        return ", ".join([name, f"{facts.pop('batch')} x {facts.pop('seq')}", *map(str, facts.values())])


def cases() -> list[Case]:
    """Whole models in both regimes, and two MLP blocks of four sizes."""
    found = []
    for rest in ("all", "none"):
        for model, batch, seq, dtype in (
            ("minilm-l6", 16, 128, "float32"),
            ("roberta-base", 8, 128, "float32"),
            ("roberta-base", 32, 128, "float32"),
            ("roberta-large", 8, 128, "float32"),
            ("roberta-large", 32, 128, "float32"),
            ("llama-2-7b", 1, 512, "bfloat16"),
            ("llama-2-7b", 4, 2048, "bfloat16"),
        ):
            strict = model == "roberta-base" and batch == 32
            promised = {**ON_MODELS, **({("peak_step_bytes", None): 0.92} if strict else {})}
            workload = {"model": model, "batch": batch, "seq": seq, "dtype": dtype, "train_rest": rest}
            found.append(Case(workload, promised))
    for block in ((384, 1536), (768, 3072), (1024, 4096), (4096, 11008)):
        for tokens in (512, 1024, 4096):
            found.append(Case({"block": block, "batch": 4, "seq": tokens // 4}, ON_BLOCKS))
    return found


def records(case: Case, forms: Sequence[str] = FORMS, device: str = "cpu") -> list[Record]:
    """LoRA's record on the case, then the forms' at as many trained parameters, then on blocks that of `LEAST`."""
    methods = (REFERENCE, *forms, *((LEAST,) if "block" in case.workload else ()))
    specs = plan(",".join(methods), REFERENCE, **case.workload, device=device, optimizer_impl="foreach")
    return [predict(spec) for spec in specs]


def ratio(record: Record, reference: Record, metric: str) -> float | None:
    """How many times the reference's bytes; None where either is not known."""
    found, base = getattr(record, metric), getattr(reference, metric)
    return None if found is None or base is None else found / base


def missed(case: Case, found: Sequence[Record]) -> Iterator[str]:
    """Every promise that the records of a case do not keep, in words."""
    reference, *others = found
    forms = [record for record in others if record.method != LEAST]
    for (metric, form), most in case.promised.items():
        if out_of_reach(found, metric, most):
            continue
        ratios = [ratio(record, reference, metric) for record in forms if form in (None, record.method)]
        known = [each for each in ratios if each is not None]
        # The best form must be below LoRA, others at most at their limit.
        kept = bool(known) and (min(known) < most if most == 1.0 else min(known) <= most)
        if not kept:
            yield f"{metric} of {form or 'the best form'}: {min(known, default=float('nan')):.4f}, promised {most}"
    for record in forms:
        if record.status == "ok" and record.peak_preparation_bytes > MOST_PREPARATION * record.peak_step_bytes:
            share = record.peak_preparation_bytes / record.peak_step_bytes
            yield f"preparation of {record.method}: {share:.2f} of its own peak, promised {MOST_PREPARATION}"


def out_of_reach(found: Sequence[Record], metric: str, most: float) -> float | None:
    """What a step that trains nothing takes, divided by LoRA's, where it is known and more than is promised."""
    known = [ratio(record, found[0], metric) for record in found[1:] if record.method == LEAST]
    return next((each for each in known if each is not None and each > most), None)


def _lines(case: Case, found: Sequence[Record]) -> Iterator[str]:
    reference = found[0]
    for record in found:
        if record.status != "ok":
            yield f"| {case.label} | {record.label} | {record.status}: {record.reason} | | | | |"
            continue
        cells = (
            f"{record.peak_step_bytes / 2**20:.1f}",
            f"{ratio(record, reference, 'peak_step_bytes'):.4f}",
            f"{ratio(record, reference, 'resident_bytes'):.4f}",
            f"{record.peak_preparation_bytes / record.peak_step_bytes:.2f}",
            "" if record.method == LEAST else f"{ratio(record, reference, 'budget_params'):.4f}",
        )
        yield f"| {case.label} | {record.label} | " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and what it misses; 0 where every promise that a method can keep is kept, 1 where one is not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.promise", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=SEMANTICS, default="cpu", help="whose kernels' semantics (default: cpu)")
    device = parser.parse_args(arguments).device
    columns = ("case", "method", "step, MiB", "/ LoRA's", "resident / LoRA's", "preparation / step", "params / LoRA's")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    broken, beyond = [], []
    for case in cases():
        found = records(case, device=device)
        for line in _lines(case, found):
            print(line, flush=True)
        for (metric, _), most in case.promised.items():
            if least := out_of_reach(found, metric, most):
                beyond.append(f"{case.label}: {metric}, promised {most}: training nothing takes {least:.4f}")
        broken += [f"{case.label}: {what}" for what in missed(case, found)]
    for title, lines in (("promises missed", broken), ("promises that no method can keep", beyond)):
        print(f"\n{len(lines)} {title}" + "".join(f"\n- {what}" for what in lines))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
