"""The measured steps are read as published, and what they held before the first step follows from their tensors."""

import pytest

from benchmarks.harness.caching_allocator import CachingAllocator
from benchmarks.harness.errors import InputError
from benchmarks.harness.measured import T4_LORA, measured_steps

MIB, RANK = 2**20, 32
STEPS = measured_steps()


def loaded(step):
    """Bytes of each tensor on the card before the first step, in the order of the modules: half weights, then LoRA."""
    hidden, heads, layers = step.hidden_size, step.num_attention_heads, step.num_layers
    kv = hidden // heads * step.num_key_value_heads
    attention = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]  # q, k, v, o as (out, in)
    mlp = [(step.intermediate_size, hidden)] * 2 + [(hidden, step.intermediate_size)]
    layer = [2 * n_out * n_in for n_out, n_in in attention + mlp] + [2 * hidden] * 2  # and two norms
    embedding = 2 * step.vocab_size * hidden
    weights = [embedding, *layer * layers, 2 * hidden] + ([] if step.tie_word_embeddings else [embedding])
    frequencies = 4 * (hidden // heads // 2)  # of the rotary embedding, in float
    factors = [4 * RANK * n for n_out, n_in in attention * layers for n in (n_in, n_out)]
    return [*weights, frequencies, *factors]


def test_the_ten_steps_are_there():
    assert [(s.model.split("/")[1], s.batch, s.seq, s.attention) for s in STEPS] == [
        *[
            ("SmolLM2-135M", batch, seq, attention)
            for attention in ("eager", "sdpa")
            for batch, seq in ((1, 4096), (2, 512))
        ],
        *[
            ("TinyLlama-1.1B-Chat-v1.0", 2, seq, attention)
            for attention in ("eager", "sdpa")
            for seq in (512, 1024, 2048)
        ],
    ]
    assert [s.tie_word_embeddings for s in STEPS] == [True] * 4 + [False] * 6
    # The last row, field by field, as the published table has it.
    last = STEPS[-1]
    assert (last.family, last.hidden_size, last.num_layers, last.intermediate_size) == ("llama", 2048, 22, 5632)
    assert (last.num_attention_heads, last.num_key_value_heads, last.vocab_size) == (32, 4, 32000)
    assert (last.before_first_step_mib, last.peak_forward_mib, last.peak_backward_mib) == (2134.55, 3870.18, 4354.12)
    assert (last.peak_optimizer_mib, last.peak_reserved_mib) == (2570.33, 4696.0)


@pytest.mark.parametrize("step", STEPS, ids=lambda s: f"{s.model}-{s.seq}-{s.attention}")
def test_trainable_params_are_lora_of_rank_32_on_the_attention(step):
    hidden = step.hidden_size
    kv = hidden // step.num_attention_heads * step.num_key_value_heads
    assert step.trainable_params == step.num_layers * RANK * (4 * hidden + 2 * (hidden + kv))


@pytest.mark.parametrize("step", STEPS, ids=lambda s: f"{s.model}-{s.seq}-{s.attention}")
def test_what_was_allocated_before_the_first_step_follows_from_the_allocator(step):
    allocator = CachingAllocator()
    for size in loaded(step):
        allocator.allocate(size)
    assert round(allocator.allocated_bytes / MIB, 2) == step.before_first_step_mib
    # Without the allocator's rules it would not: norms of 1152 bytes (SmolLM2), two matrices of 125 MiB (TinyLlama).
    assert round(allocator.requested_bytes / MIB, 2) < step.before_first_step_mib


def test_tables_that_cannot_be_read(tmp_path):
    header, first, *_ = T4_LORA.read_text().splitlines()
    with pytest.raises(InputError, match=r"cannot read the measured steps in .*: No such file"):
        measured_steps(tmp_path / "none.csv")
    path = tmp_path / "steps.csv"
    path.write_text(f"{header.replace('seq', 'length')}\n{first}\n")
    with pytest.raises(InputError, match=r"must have the columns model,.*, got model,.*length"):
        measured_steps(path)
    path.write_text(f"{header}\n{first.replace('4096', 'long', 1)}\n")
    with pytest.raises(InputError, match="line 2: seq must be of type int, got 'long'"):
        measured_steps(path)
    path.write_text(f"{header}\n{first.replace('True', 'yes')}\n")
    with pytest.raises(InputError, match="tie_word_embeddings must be of type bool, got 'yes'"):
        measured_steps(path)
    path.write_text("")
    with pytest.raises(InputError, match=r"must have the columns .*, got $"):
        measured_steps(path)
