"""Predictions held against training steps that others measured on a GPU: `python -m benchmarks.validation`.

The steps are those of `harness/measured.py`; they are taken as their authors took them, which is not the harness's
protocol: peft's LoRA, one step of warm-up, and an output object that lives until the optimizer has stepped. No number
of the prediction was fitted to them. Two choices between what PyTorch's sources allow were made with rows in view: the
order of the segments' addresses (`harness/caching_allocator.py`) with five of the first ten, where it moves reserved
bytes alone; and that cuBLASLt's workspace is one of its own (`harness/cuda_kernels.py`) with the four of Qwen 2.5.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
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

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
PHASES = ("forward", "backward", "optimizer")
MIB = 2**20


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


def main(tables: Sequence[Path] = (T4_LORA, T4_MORE)) -> int:
    """Print a table of both: each measured figure and by how much the prediction differs from it."""
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
