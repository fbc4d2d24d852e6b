"""Predictions against training steps measured on cards: others' on a Tesla T4, row by row, and our own on an H100."""

import pytest

from baselines.registry import methods
from benchmarks.harness.measured import T4_MORE, measured_steps
from benchmarks.validation import H100, MIB, held_against, main, predicted_step
from reports.agreement import FIGURES
from reports.record import read, write

# Of the further steps one of each kind: bias terms, no checkpointing, full fine-tuning, float32.
OTHERS = ("Qwen2.5-1.5B-Instruct, 1 x 2048, sdpa", "llama-160m", "SmolLM2-135M, 2 x 1024, eager, LoRA 32, float32")
MORE = [step for step in measured_steps(T4_MORE) if step.label.startswith(OTHERS)]


def test_each_kind_is_there():
    kinds = {(step.family, step.rank, step.dtype, step.checkpointing, step.attention) for step in MORE}
    assert kinds == {
        ("qwen2", 32, "float16", True, "sdpa"),
        ("llama", 32, "float16", False, "eager"),
        ("llama", 32, "float16", False, "sdpa"),
        ("llama", 0, "float32", True, "eager"),
        ("llama", 32, "float32", True, "eager"),
    }


@pytest.mark.parametrize("step", [*measured_steps(), *MORE], ids=lambda step: step.label)
def test_a_measured_step_is_predicted(step):
    found = predicted_step(step)
    # Tighter than what is promised (0.5 %, reserved 5 %), in which a missing workspace could hide.
    reserved = found.pop("peak_reserved_mib")
    assert found == {name: pytest.approx(getattr(step, name), rel=0.001, abs=step.resolution_mib) for name in found}
    assert len(found) == 3
    assert reserved == pytest.approx(step.peak_reserved_mib, rel=0.005)


# --- this project's own runs on an H100

RECORDS = read(H100)
# Of each kind of run some that are soon predicted; all of them take minutes (python -m benchmarks.validation).
QUICK = [
    record
    for record in RECORDS
    if record.model in ("block 768x3072", "block 1024x4096")
    or (record.model, record.method) == ("layer 4096x11008", "lora")
    or (record.model == "tinyllama-1.1b" and record.attention == "eager")
    or (record.model == "gpt2" and record.method == "full")
    or (record.model == "bert-base" and record.method in ("random-mask", "sparsegrad-core"))
    or (record.dtype == "bf16-mixed" and record.method == "lora")
    or (record.model == "roberta-base" and record.dtype == "bfloat16" and record.method == "sparsegrad")
    or (record.checkpointing and record.method == "full")
    or record.optimizer == "adamw8bit"
]


def test_the_records_are_of_a_card():
    assert len(RECORDS) == 126
    for record in RECORDS:
        assert (record.source, record.status, record.device_semantics) == ("measured", "ok", "cuda")
        assert record.device_name == "NVIDIA H100 80GB HBM3"
        assert (record.alloc_retries, record.alloc_ooms) == (0, 0)
    assert {record.method for record in RECORDS} >= set(methods())
    assert {record.dtype for record in QUICK} == {"float32", "bfloat16", "bf16-mixed"}


@pytest.mark.parametrize("record", QUICK, ids=lambda r: f"{r.label}, {r.model}, {r.dtype}, {r.optimizer}")
def test_a_run_on_the_card_is_predicted(record):
    pair = held_against(record)
    assert pair.predicted.status == "ok"
    assert [one.field for one in pair.comparisons] == list(FIGURES)
    for one in pair.comparisons:
        # What is promised is 2 % or 2 MiB, of reserved bytes 5 %; these come in segments of 20 MiB and more.
        reserved = one.field == "peak_reserved_bytes"
        allowed = max(0.05 * one.measured, 22 * MIB) if reserved else max(0.005 * one.measured, 2 * MIB)
        assert abs(one.difference) <= allowed, one.field
    # Where nothing depends on values, what is requested is known to within a few KiB.
    requested = next(one for one in pair.comparisons if one.field == "peak_requested_bytes")
    assert abs(requested.difference) < 16 * 1024


# Field -> the record of which the docs say that it differs most.
WORST = {
    "resident_bytes": ("sparsegrad-core", "layer 4096x11008", "float32"),
    "peak_forward_bytes": ("smt", "roberta-base", "float32"),
    "peak_backward_bytes": ("smt", "roberta-base", "float32"),
    "peak_optimizer_bytes": ("full", "roberta-base", "bfloat16"),
    "peak_eval_bytes": ("sparsegrad-core", "layer 4096x11008", "float32"),
    "peak_preparation_bytes": ("sparsegrad-fixed", "layer 4096x11008", "float32"),
    "peak_requested_bytes": ("smt", "roberta-base", "float32"),
    "peak_reserved_bytes": ("meprop-example", "block 768x3072", "float32"),
}


@pytest.fixture(scope="module")
def worst_pairs():
    return {
        key: held_against(next(r for r in RECORDS if (r.method, r.model, r.dtype) == key))
        for key in set(WORST.values())
    }


@pytest.mark.parametrize("field", FIGURES)
def test_the_docs_print_how_far_the_worst_prediction_is_off(field, worst_pairs):
    one = next(one for one in worst_pairs[WORST[field]].comparisons if one.field == field)
    off = f"{float(one.share) * 100:+.2f} % ({one.difference / MIB:+.1f} of {one.measured / MIB:.1f} MiB)"
    text = (H100.parents[3] / "docs" / "prediction.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {FIGURES[field]} |")]
    counts, said = line.split("|")[2].split(" of "), line.split("|")[4].strip()
    assert (int(counts[1]), said) == (len(RECORDS), off)


def test_the_command_prints_both_tables(tmp_path, capsys):
    write([next(record for record in QUICK if record.method == "lora")], tmp_path / "records.json")
    assert main((), tmp_path / "records.json") == 0
    printed = capsys.readouterr().out
    assert "| resident | 1 of 1 | 1 | +0.00%" in printed
    assert printed.count("\n|") == 2 + 1 + len(FIGURES)
