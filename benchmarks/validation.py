"""Predictions held against training steps that were measured on GPUs: `python -m benchmarks.validation`.

Those of `harness/measured.py` are others', taken as their authors took them, which is not the harness's protocol:
peft's LoRA, one step of warm-up, and an output object that lives until the optimizer has stepped. No number of the
prediction was fitted to them. Two choices between what PyTorch's sources allow were made with rows in view: the order
of the segments' addresses (`harness/caching_allocator.py`) with five of the first ten, where it moves reserved bytes
alone; and that cuBLASLt's workspace is one of its own (`harness/cuda_kernels.py`) with the four of Qwen 2.5.

Those of `on_card.py` are this project's own, by the harness's protocol. Before they were there the predictions knew
neither partial results of reductions nor any room of cuSOLVER. These causes were found with the records in view, and
then modelled by PyTorch's sources and by what single operations allocate.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from benchmarks.harness.caching_allocator import AllocatorBytes, CachingAllocator, peaks_between
from benchmarks.harness.cards import card
from benchmarks.harness.cuda_kernels import CudaKernels
from benchmarks.harness.errors import InputError
from benchmarks.harness.fake import KnownValues, lay_fakes, not_traced
from benchmarks.harness.measured import T4_LORA, T4_MORE, MeasuredStep, measured_steps
from benchmarks.harness.memory import Span, Tracker, steady_collection
from benchmarks.harness.models import attention_kernel
from benchmarks.harness.predict import predict
from benchmarks.harness.spec import RunSpec
from reports.agreement import FIGURES, Comparison, Pair
from reports.record import Record, read

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
PHASES = ("forward", "backward", "optimizer")
MIB = 2**20
H100 = Path(__file__).parent / "reference" / "h100" / "records.json"
# Fields of a record that are asked for, by the same name, in a spec.
ASKED = (
    "method",
    "budget",
    "targets",
    "train_rest",
    "batch",
    "seq",
    "dtype",
    "adapter_dtype",
    "optimizer",
    "optimizer_impl",
    "checkpointing",
    "accumulate",
    "calibration_steps",
    "lr",
    "seed",
)


def predicted_step(step: MeasuredStep, ascending: bool = False) -> dict[str, float]:
    """What the step is predicted to have measured, in MiB, by the names of `MeasuredStep`.

    `ascending` is the order of the segments' addresses, as `CachingAllocator` has it. Raises `InputError` without peft.
    """
    attention = "sdpa-efficient" if step.attention == "sdpa" else step.attention
    kernels = CudaKernels(card("t4"))
    tracker = Tracker(fake=True, kernels=kernels)
    with FakeTensorMode() as mode, KnownValues(), not_traced(), kernels.functions(), attention_kernel(attention):
        spans = _steps(lay_fakes(_model(step), mode), step, tracker)
    peaks = peaks_between(tracker.events, [(s.start, s.end) for s in spans], CachingAllocator(ascending=ascending))
    return _named(peaks)


def _model(step: MeasuredStep) -> nn.Module:
    """The adapted model on meta."""
    try:
        import peft
    except ImportError as error:
        raise InputError("these steps were measured with peft, which is not installed: pip install peft") from error
    from transformers import AutoConfig, AutoModelForCausalLM

    shared = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    config = AutoConfig.for_model(
        step.family,
        **{name: getattr(step, name) for name in shared},
        num_hidden_layers=step.num_layers,
        tie_word_embeddings=step.tie_word_embeddings,
        max_position_embeddings=step.seq,
        use_cache=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, step.dtype), attn_implementation=step.attention
        )
        if step.rank:
            model = peft.get_peft_model(model, peft.LoraConfig(r=step.rank, target_modules=TARGETS))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if step.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _steps(model: nn.Module, step: MeasuredStep, tracker: Tracker) -> list[Span]:
    """Two training steps under the tracker; the second one's phases."""
    tracker.adopt(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=True)  # torch's choice on CUDA
    with tracker, steady_collection():
        tokens = torch.randint(0, step.vocab_size, (step.batch, step.seq))
        for _ in range(2):
            spans = []
            for phase in PHASES:
                with tracker.phase(phase) as span:
                    if phase == "forward":
                        output = model(input_ids=tokens, labels=tokens)
                    elif phase == "backward":
                        output.loss.backward()
                    else:
                        optimizer.step()
                spans.append(span)
            optimizer.zero_grad()
            del output
    return spans


def _named(peaks: Sequence[AllocatorBytes]) -> dict[str, float]:
    found = {f"peak_{phase}_mib": peak.allocated_bytes / MIB for phase, peak in zip(PHASES, peaks, strict=True)}
    return {**found, "peak_reserved_mib": max(peak.reserved_bytes for peak in peaks) / MIB}


def spec_on(record: Record, gpu: str) -> RunSpec:
    """The spec that asks for a measured record's prediction on the card of that name."""
    kind, _, shape = record.model.partition(" ")
    workload = {kind: tuple(map(int, shape.split("x")))} if shape else {"model": record.model}
    asked = {name: getattr(record, name) for name in ASKED} | workload
    return RunSpec(**asked, attention=record.attention or "sdpa", device="cuda", gpu=gpu, rounds=0)


def held_against(record: Record, gpu: str = "h100") -> Pair:
    """A measured record beside its prediction."""
    return Pair(record, predict(spec_on(record, gpu)))


def _summary(field: str, compared: Sequence[Comparison]) -> str:
    """A line of the table: how many agree, and which differs most."""
    known = [one for one in compared if one.field == field]
    equal = sum(one.difference == 0 for one in known)
    close = sum(abs(one.share) <= Fraction(1, 1000) for one in known)
    worst = max(known, key=lambda one: abs(one.share))
    record = worst.pair.measured
    case = f"{record.label} on {record.model}, {record.dtype}"
    off = f"{float(worst.share):+.2%} ({worst.difference / MIB:+.1f} of {worst.measured / MIB:.1f} MiB)"
    return f"| {FIGURES[field]} | {equal} of {len(known)} | {close} | {off} | {case} |"


def main(tables: Sequence[Path] = (T4_LORA, T4_MORE), card_records: Path = H100) -> int:
    """Print both tables: by how much predictions differ from each of others' steps, and from the card's own records."""
    _print_steps(tables)
    compared = []
    for record in read(card_records):
        pair = held_against(record)
        if pair.predicted.status != "ok":
            print(f"{record.label} on {record.model}: {pair.predicted.status}, {pair.predicted.reason}")
            continue
        compared += pair.comparisons
    print("\n| figure | to the byte | within 0.1 % | largest difference | of |")
    print("|---" * 5 + "|")
    for field in FIGURES:
        print(_summary(field, compared))
    return 0


def _print_steps(tables: Sequence[Path]) -> None:
    print("| step | " + " | ".join(f"{what}, MiB | predicted" for what in (*PHASES, "reserved")) + " |")
    print("|---" * 9 + "|")
    for step in (step for table in tables for step in measured_steps(table)):
        cells = []
        digits = 2 if step.resolution_mib < 1 else 0
        for name, value in predicted_step(step).items():
            measured = getattr(step, name)
            difference = round(value / measured - 1, 5) or 0.0  # of either sign
            cells.append(f"{measured:.{digits}f} | {difference:+.3%}")
        print(f"| {step.label} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
