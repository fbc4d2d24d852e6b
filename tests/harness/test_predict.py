"""The prediction is the tracked run, to the byte: the same steps on tensors that have no memory."""

import json
import math
import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, UnsupportedFakeTensorException

from baselines.method import target_shapes
from baselines.registry import get, methods
from baselines.smt import choose_blocks
from benchmarks.harness import fake, models, text
from benchmarks.harness.errors import InputError
from benchmarks.harness.fake import KnownValues, lay_fakes, not_traced
from benchmarks.harness.memory import Tracker
from benchmarks.harness.packaged import locate
from benchmarks.harness.predict import CONTEXT_BYTES, Answers, predict
from benchmarks.harness.protocol import track
from benchmarks.harness.spec import RunSpec
from reports.record import BREAKDOWN
from sparsegrad import SparseGradError, StreamingHOSVD
from sparsegrad.products import Selection

MIB = 2**20
CORE = list(methods())
# Four in the small weights; a prime, so that nothing divides it.
BUDGET = {name: (7 if cls.knob else None) for name, cls in methods().items()}
# Predicted entries are spread evenly, and where a run's lie follows from gradients: half of them leave no block empty.
BUDGET |= {"sparsegrad-fixed": 0.5, "sift": 0.5}
# So are predicted blocks, and where there are few it is not known whether two lie in the same columns.
FOLLOW_GRADIENTS = ("sparsegrad-fixed", "sift", "smt")

SHAPES = {
    "layer": {"layer": (37, 53), "batch": 3, "seq": 11},
    "layer-one-token": {"layer": (16, 24), "batch": 1, "seq": 1, "train_rest": "none", "dtype": "bfloat16"},
    "block-foreach": {"block": (48, 96), "batch": 2, "seq": 16, "optimizer_impl": "foreach", "train_rest": "none"},
    "block-bfloat16-fused": {
        "block": (31, 96),
        "batch": 2,
        "seq": 16,
        "dtype": "bfloat16",
        "adapter_dtype": "float32",
        "optimizer_impl": "fused",
    },
}
CONFIGS = {
    "bert": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt2": {"n_embd": 48, "n_layer": 1, "n_head": 2, "vocab_size": 1009},  # Conv1D, tied embeddings
    "llama": {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,  # grouped
        "vocab_size": 1009,
        "tie_word_embeddings": True,
    },
    "albert": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
    "electra": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
    "distilbert": {"dim": 48, "hidden_dim": 96, "n_layers": 2, "n_heads": 2},
}
# `text`: a tokenizer lies beside the config, so that questions of unequal length are padded to `seq`.
MODELS = {
    "bert-eager": {"model": "bert", "batch": 8, "seq": 12, "attention": "eager"},
    "bert-padded-sdpa-bfloat16": {"model": "bert", "text": True, "batch": 8, "seq": 24, "dtype": "bfloat16"},
    "bert-padded-eager-checkpointing": {
        "model": "bert",
        "text": True,
        "batch": 8,
        "seq": 24,
        "attention": "eager",
        "checkpointing": True,
        "train_rest": "none",
        "optimizer_impl": "foreach",
    },
    "bert-text-without-padding": {"model": "bert", "text": True, "batch": 8, "seq": 4, "optimizer_impl": "fused"},
    "gpt2-eager": {"model": "gpt2", "batch": 2, "seq": 12, "attention": "eager", "optimizer_impl": "fused"},
    "gpt2-sdpa-bfloat16-checkpointing": {
        "model": "gpt2",
        "batch": 2,
        "seq": 12,
        "dtype": "bfloat16",
        "checkpointing": True,
    },
    "llama-eager": {
        "model": "llama",
        "batch": 2,
        "seq": 12,
        "attention": "eager",
        "train_rest": "none",
        "optimizer_impl": "foreach",
    },
    "llama-sdpa-checkpointing": {"model": "llama", "batch": 3, "seq": 10, "checkpointing": True},
    "llama-sdpa-bfloat16": {
        "model": "llama",
        "batch": 1,
        "seq": 17,
        "dtype": "bfloat16",
        "adapter_dtype": "float32",
    },
}


@pytest.fixture(scope="module", autouse=True)
def texts_read_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "load", cache(text.load))
        yield


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """Model type, with text or not, changes of the config -> the path of its config.json or directory."""

    @cache
    def make(model_type, text=False, changes=()):
        directory = tmp_path_factory.mktemp(model_type)
        config = {"model_type": model_type, "vocab_size": 30522, **CONFIGS[model_type], **dict(changes)}
        path = directory / "config.json"
        path.write_text(json.dumps(config))
        if not text:
            return str(path)
        packaged = locate(models.MINILM, "model")
        for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(packaged / name, directory / name)
        return str(directory)

    return make


def spec(method, **options):
    asked = RunSpec(method=method, budget=BUDGET[method], **{"calibration_steps": 3, "rounds": 0, **options})
    if method != "smt":
        return asked
    # All blocks there are: that is known.
    workload = asked.workload()
    model = workload.skeleton()
    return replace(asked, budget=get("smt").largest_budget(target_shapes(model, workload.layers(model))))


def run(a_spec):
    """The fields of the tracked run on real tensors."""
    done = track(a_spec, a_spec.workload(), Tracker())
    return {**done.facts(), **done.peaks()}


def assert_equal_to_the_byte(a_spec):
    real, predicted = run(a_spec), predict(a_spec)
    assert (predicted.status, predicted.reason) == ("ok", None)
    assert (predicted.source, predicted.device_semantics) == ("predicted", "cpu")
    found = {name: getattr(predicted, name) for name in real}
    for loss in ("loss_first", "loss_last"):
        assert found.pop(loss) is None
        real.pop(loss)
    assert real["peak_step_bytes"] > 0
    assert found == real


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", FOLLOW_GRADIENTS)
def test_shapes_of_what_depends_on_values(method, shape):
    assert_equal_to_the_byte(spec(method, **SHAPES[shape]))


def test_one_block_of_one_layer_needs_its_columns_wherever_it_lies():
    # 48 x 96 in blocks of 48 x 48.
    assert_equal_to_the_byte(RunSpec("smt", budget=1, layer=(96, 48), batch=3, seq=11, calibration_steps=3, rounds=0))


@st.composite
def shapes(draw, method):
    """A layer or two blocks of any small size, under any conditions, with any budget that fits."""
    sides = st.integers(1, 48)
    d_in, d_out, kind = draw(sides), draw(sides), draw(st.sampled_from(["layer", "block"]))
    targets = [(d_out, d_in)] if kind == "layer" else [(d_out, d_in), (d_in, d_out)]
    budget = draw(st.integers(1, get(method).largest_budget(targets))) if get(method).knob else None
    return RunSpec(
        method=method,
        budget=budget,
        **{kind: (d_in, d_out)},
        batch=draw(st.integers(1, 3)),
        seq=draw(st.integers(1, 7)),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float64"])),
        adapter_dtype=draw(st.sampled_from(["same", "float32"])),
        optimizer_impl=draw(st.sampled_from(["for-loop", "foreach", "fused"])),
        train_rest=draw(st.sampled_from(["all", "none"])),
        calibration_steps=3,
        rounds=0,
        seed=draw(st.integers(0, 9)),
    )


@pytest.mark.parametrize("method", [name for name in CORE if name not in FOLLOW_GRADIENTS])
@settings(max_examples=3, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_any_shape(method, data):
    assert_equal_to_the_byte(data.draw(shapes(method)))


# The others share their functions with these, or with one another.
THROUGHOUT = ("full", "head", "lora", "meprop-example", "meprop-unified", "meprop-weight", "random-mask", "sparsegrad")
FORM_CASES = (
    "bert-padded-sdpa-bfloat16",
    "bert-padded-eager-checkpointing",
    "gpt2-sdpa-bfloat16-checkpointing",
    "llama-eager",
)


@pytest.mark.parametrize(
    ("case", "method"),
    [
        (case, method)
        for case in MODELS
        for method in CORE
        # LLaMA's layers have no biases: bitfit refuses them.
        if (case in FORM_CASES or method in THROUGHOUT) and not (method == "bitfit" and case.startswith("llama"))
    ],
)
def test_models(case, method, model_path):
    options = dict(MODELS[case])
    path = model_path(options.pop("model"), options.pop("text", False))
    assert_equal_to_the_byte(spec(method, model=path, **options))


def test_the_cases_are_padded_where_they_say_so(model_path):
    for case, options in MODELS.items():
        path = model_path(options["model"], options.get("text", False))
        workload = RunSpec(method="full", model=path, batch=options["batch"], seq=options["seq"]).workload()
        padded = workload.padding_fraction(next(workload.batches())) > 0
        assert padded == ("padded" in case), case


def test_what_no_prediction_can_know_is_missing():
    record = predict(spec("lora", **SHAPES["layer"]))
    missing = {"kernel_workspace_bytes", "preparation_workspace_bytes", "process_peak_bytes", "step_time_s"}
    missing |= {"preparation_time_s", "touched_params", "device_name", "threads"}
    assert {name for name in missing if getattr(record, name) is not None} == set()
    assert record.calibration_steps == 3  # as asked for, though two are enough


def test_what_no_machine_holds_has_the_closed_form():
    d, tokens = 200_000, 4
    record = predict(spec("full", layer=(d, d), batch=1, seq=tokens))
    weights = 4 * (d * d + d)
    assert record.resident_bytes == 3 * weights + 2 * 4  # 447 GiB; two step counters
    # The root of the second moment and its corrected copy; X, Y, dL/dY; the gradients.
    assert record.peak_optimizer_bytes == 4 * weights + 8 + 2 * 4 * d * d + 3 * 4 * tokens * d
    assert sum(getattr(record, name) for name in BREAKDOWN) == record.peak_step_bytes


def test_a_config_whose_values_do_not_go_together_is_a_record_that_says_so(model_path):
    path = model_path("bert", changes=(("chunk_size_feed_forward", 7),))
    record = predict(spec("full", model=path, batch=1, seq=4))
    assert record.status == "crashed"
    assert record.reason == "ValueError: The dimension to be chunked 4 has to be a multiple of the chunk size 7"
    assert record.peak_step_bytes is None


def test_a_preset():
    record = predict(spec("lora", model="bert-base", batch=1, seq=4, dtype="bfloat16"))
    own = 7 * 12 * 2 * (768 + 3072)
    assert record.total_params == 109_483_778 + own  # as published, with two classes
    assert record.budget_params == own


@pytest.mark.parametrize(
    ("model_type", "targets"),
    [("electra", "intermediate.dense,key"), ("distilbert", "lin1,lin2,v_lin"), ("distilbert", "all-linear")],
)
@pytest.mark.parametrize("method", ["sparsegrad", "lora", "full"])
def test_encoders_of_other_families(method, model_type, targets, model_path):
    assert_equal_to_the_byte(spec(method, model=model_path(model_type), targets=targets, batch=8, seq=12))


def test_attention_layers(model_path):
    options = {"batch": 8, "seq": 18, "targets": "attention", "attention": "eager"}
    assert_equal_to_the_byte(spec("sparsegrad", model=model_path("bert"), **{**options, "targets": "all-linear"}))
    assert_equal_to_the_byte(spec("meprop-weight", model=model_path("gpt2"), **options))
    assert_equal_to_the_byte(spec("lora", model=model_path("llama"), **options))
    assert_equal_to_the_byte(spec("sparsegrad", model=model_path("llama"), **options))


@pytest.mark.parametrize("method", ["sparsegrad", "lora", "full"])
def test_first_queries_of_short_sequences(method, model_path):
    # What the softmax of a decoder's first query, which has one key, sends back is a matter of rounding; where
    # sequences are short, it decides whether zero rows are many enough to be skipped.
    options = {"batch": 8, "seq": 16, "targets": "attention", "attention": "eager"}
    record = predict(spec(method, model=model_path("llama"), **options))
    assert record.status == "refused"
    assert "self_attn.q_proj" in record.reason


# --- what depends on values


@pytest.mark.parametrize("case", ["bert-padded-sdpa-bfloat16", "bert-text-without-padding"])
def test_calibration_that_does_not_repeat_itself_runs_whole(case, model_path, monkeypatch):
    options = {**MODELS[case], "model": model_path("bert", True)}
    options.pop("text")
    a_spec = spec("sparsegrad", **options)
    drawn = []
    workload_type = type(a_spec.workload())
    monkeypatch.setattr(workload_type, "run_backward", lambda *_: drawn.append(1))
    monkeypatch.setattr(workload_type, "batches_alike", lambda *_: False)
    predict(a_spec)
    assert len(drawn) == 3
    monkeypatch.undo()
    assert a_spec.workload().batches_alike(3)


def test_columns_that_dropout_may_empty_are_refused(model_path):
    options = {"model": model_path("bert"), "batch": 1, "seq": 12}
    record = predict(spec("meprop-weight", **options))
    assert record.status == "refused"
    assert "dropout of 0.1 may empty many columns" in record.reason
    assert record.peak_step_bytes is None
    # 48 columns, one row, one in ten: not so behind a change of basis, which mixes the columns, nor without dropout.
    assert_equal_to_the_byte(spec("sparsegrad", **options))
    without = model_path("bert", changes=(("hidden_dropout_prob", 0.0), ("attention_probs_dropout_prob", 0.0)))
    assert_equal_to_the_byte(spec("meprop-weight", **{**options, "model": without}))
    # Two rows leave one column in a hundred empty: an eighth of 48 never.
    assert_equal_to_the_byte(spec("meprop-weight", **{**options, "batch": 2}))


def test_columns_of_which_nothing_is_known_are_refused(model_path):
    relu = model_path("bert", changes=(("hidden_act", "relu"),))
    record = predict(spec("meprop-weight", model=relu, batch=8, seq=12))
    assert record.status == "refused"
    assert "not known which columns of dL/dY are zero" in record.reason
    assert_equal_to_the_byte(spec("lora", model=relu, batch=8, seq=12))


@pytest.mark.parametrize("method", ["sparsegrad", "meprop-weight", "lora", "full"])
def test_rows_of_which_nothing_is_known_are_refused(method, model_path):
    # Whose classifier reads what is not known.
    options = {"model": model_path("albert"), "targets": "ffn,ffn_output", "batch": 8, "seq": 12}
    record = predict(spec(method, **options))
    assert record.status == "refused"
    assert "not known which rows of dL/dY are zero" in record.reason


def test_a_decoder_of_one_token_has_no_row(model_path):
    assert predict(spec("sparsegrad", model=model_path("llama"), batch=2, seq=1)).status == "refused"


# --- on a card


def card_spec(method, **options):
    return spec(method, **{"device": "cuda", "optimizer_impl": "foreach", **options})


def test_a_layer_on_a_card_has_the_closed_form():
    record = predict(card_spec("full", layer=(256, 512), batch=4, seq=32, gpu="a100"))
    # Multiples of 512 bytes, small or from segments that are split: what is allocated is what was asked for.
    weights, x, y = 4 * (256 * 512 + 512), 4 * 128 * 256, 4 * 128 * 512
    workspaces = 2 * 8_519_680 + MIB  # cuBLAS's in forward and in backward, and that of the product with a bias
    resident = 3 * weights + workspaces  # AdamW's step counters are on the host
    held = x + 2 * y  # X, Y, dL/dY
    assert record.resident_bytes == resident
    assert record.peak_forward_bytes == resident + held
    assert record.peak_backward_bytes == resident + held + x + weights  # dL/dX and the gradients
    assert record.peak_optimizer_bytes == resident + held + 2 * weights  # the gradients and foreach's square roots
    assert record.peak_step_bytes == record.peak_requested_bytes == record.peak_optimizer_bytes
    assert record.peak_reserved_bytes >= record.peak_step_bytes
    assert record.peak_reserved_bytes % (2 * MIB) == 0


def test_a_layer_on_a_card_is_allocated_in_whole_blocks():
    record = predict(card_spec("lora", layer=(300, 700), batch=1, seq=3, gpu="t4"))

    def block(*shape):
        return -(-4 * math.prod(shape) // 512) * 512

    own = block(7, 300) + block(700, 7)
    resident = block(700, 300) + 3 * block(700) + 3 * own + 2 * 8_519_680 + MIB
    assert record.resident_bytes == resident
    # X, Y, dL/dY and X A^T.
    assert record.peak_forward_bytes == resident + block(3, 300) + 2 * block(3, 700) + block(3, 7)
    assert record.peak_requested_bytes < record.peak_step_bytes


CARD_CASES = {
    "bert-padded": {"model": "bert", "text": True, "batch": 8, "seq": 24},
    "bert-padded-eager-checkpointing": {
        **MODELS["bert-padded-eager-checkpointing"],
        "train_rest": "all",
        "dtype": "float16",
    },
    "llama-grouped": {"model": "llama", "batch": 3, "seq": 10, "dtype": "bfloat16", "checkpointing": True},
    "gpt2-none": {"model": "gpt2", "batch": 2, "seq": 12, "train_rest": "none", "gpu": "t4", "dtype": "float16"},
}
# A mask that flash cannot take; a head size of 12, which cudnn cannot.
CARD_KERNELS = {"bert-padded": "efficient", "llama-grouped": "flash", "gpt2-none": "efficient"}


@pytest.mark.parametrize(
    ("case", "method"),
    [
        *[("bert-padded", method) for method in CORE],
        *[(case, method) for case in list(CARD_CASES)[1:] for method in ("lora", "sparsegrad")],
    ],
)
def test_every_method_on_a_card(case, method, model_path):
    options = dict(CARD_CASES[case])
    path = model_path(options.pop("model"), options.pop("text", False))
    record = predict(card_spec(method, model=path, **options))
    assert (record.status, record.reason) == ("ok", None)
    assert (record.source, record.device_semantics, record.device) == ("predicted", "cuda", "cuda")
    assert record.attention_kernel == CARD_KERNELS.get(case)
    assert record.gpu == options.get("gpu", "9.0")
    assert sum(getattr(record, name) for name in BREAKDOWN) == record.peak_step_bytes
    phases = (record.peak_forward_bytes, record.peak_backward_bytes, record.peak_optimizer_bytes)
    assert record.resident_bytes < record.peak_step_bytes == max(phases) <= record.peak_reserved_bytes
    assert record.peak_requested_bytes < record.peak_step_bytes
    assert record.fits is record.gpu_memory_bytes is None


def test_dropout_and_fused_attention_save_less_than_on_the_cpu(model_path):
    options = {"model": model_path("bert"), "batch": 8, "seq": 64}
    eager, fused = (predict(card_spec("full", attention=attention, **options)) for attention in ("eager", "sdpa"))
    # Of each of two layers: the softmax and what dropout makes of it, in float, with a mask; log-sum-exps instead.
    queries = 8 * 2 * 64
    assert eager.peak_forward_bytes - fused.peak_forward_bytes == 2 * ((4 + 4 + 1) * 64 - 4) * queries
    on_cpu = predict(replace(card_spec("full", attention="eager", **options), device="cpu"))
    # A byte an entry where the CPU keeps four, in dropouts: two of scores, five of hidden states, the classifier's.
    entries = 2 * 64 * queries + 5 * 8 * 64 * 48 + 8 * 48
    in_forward = [record.peak_forward_bytes - record.resident_bytes for record in (on_cpu, eager)]
    assert in_forward[0] - in_forward[1] == pytest.approx(3 * entries, abs=512 * 64)  # whole blocks


def test_a_run_fits_where_the_allocator_finds_room(model_path):
    options = {"model": model_path("bert"), "batch": 8, "seq": 64}
    record = predict(card_spec("full", **options))
    roomy = predict(card_spec("full", gpu_memory_bytes=record.peak_reserved_bytes + CONTEXT_BYTES, **options))
    assert (roomy.fits, roomy.oom_phase) == (True, None)
    assert roomy.peak_step_bytes == record.peak_step_bytes
    small = predict(card_spec("full", gpu_memory_bytes=record.peak_step_bytes + CONTEXT_BYTES - 1, **options))
    assert (small.status, small.fits) == ("ok", False)
    assert small.oom_phase == record.peak_phase
    assert small.peak_step_bytes == record.peak_step_bytes
    none = predict(card_spec("full", gpu_memory_bytes=1, **options))
    assert (none.fits, none.oom_phase) == (False, "loading")


def test_cards_that_cannot_be_meant(model_path):
    options = {"model": model_path("llama"), "batch": 1, "seq": 8}
    with pytest.raises(InputError, match="unknown card 'h1000'"):
        predict(card_spec("full", gpu="h1000", **options))
    with pytest.raises(InputError, match="--gpu and --gpu-memory go with the semantics of cuda"):
        predict(spec("full", gpu="t4", **options))
    with pytest.raises(InputError, match="sdpa-flash is a kernel of CUDA's"):
        predict(spec("full", attention="sdpa-flash", **options))
    record = predict(card_spec("full", attention="sdpa-flash", gpu="t4", dtype="float16", **options))
    assert record.status == "refused"
    assert "flash takes no compute capability 7.5" in record.reason
    assert record.peak_step_bytes is None


def test_an_unknown_device_is_bad_input():
    with pytest.raises(InputError, match="must be one of cuda, cpu, got 'tpu'"):
        predict(replace(spec("full", **SHAPES["layer"]), device="tpu"))


def test_a_budget_that_does_not_fit_is_refused():
    record = predict(replace(spec("lora", **SHAPES["layer"]), budget=38))
    assert (record.status, record.source) == ("refused", "predicted")
    assert "at most 37" in record.reason


def test_supports_too_large_to_be_drawn_are_spread_evenly(monkeypatch):
    monkeypatch.setattr(fake, "MOST_KNOWN", 1000)
    record = predict(spec("random-mask", **SHAPES["layer"]))
    assert record.status == "ok"
    with FakeTensorMode():
        # 5 blocks of 2 rows and one of 1: 22 entries are 2 a row.
        selection = Selection(torch.empty(22, dtype=torch.int32), (11, 8), block_rows=2)
    assert selection.blocks == [(0, 0, 4), (1, 4, 8), (2, 8, 12), (3, 12, 16), (4, 16, 20), (5, 20, 22)]


def test_blocks_of_which_nobody_knows_where_they_lie_are_spread_evenly():
    with FakeTensorMode():
        scores = {"a": torch.empty(2, 3), "b": torch.empty(3, 2)}
        # Each layer gets its share, in columns of their own as far as there are some.
        assert choose_blocks(scores, 5) == {"a": [(0, 0), (0, 1)], "b": [(0, 0), (0, 1), (1, 0)]}
        every = choose_blocks(scores, 12)
    assert all(len(set(blocks)) == 6 for blocks in every.values())


def test_checks_of_values_still_find_what_is_wrong():
    hosvd = StreamingHOSVD(2, 3)
    with pytest.raises(SparseGradError, match="NaN or infinity"):
        hosvd.update(torch.full((2, 3), torch.nan))
    with pytest.raises(SparseGradError, match="all are zero"):
        hosvd.transition_matrices(torch.float32)


# --- fake tensors


def test_values_that_follow_from_known_ones_are_known():
    with FakeTensorMode(), KnownValues():
        mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
        assert not (mask == 1).all()
        assert (mask[:, :2] == 1).all()
        assert mask.nonzero().shape == (5, 2)
        assert (torch.arange(4) * 2).tolist() == [0, 2, 4, 6]
        step = torch.tensor(0.0)
        step += 1
        torch._foreach_add_([step], 1)
        assert step.item() == 2.0
        drawn = torch.randperm(9, generator=torch.Generator().manual_seed(3)).sort().values[4].item()
        random = torch.randint(99, (5,), generator=torch.Generator().manual_seed(3)).tolist()
    assert drawn == 4
    assert random == torch.randint(99, (5,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.mark.parametrize(
    "question",
    [
        lambda: torch.empty(3).sum().item(),
        lambda: torch.randn(3).max().item(),
        lambda: torch.randint(9, (3,)).tolist(),  # drawn from the global generator
        lambda: (torch.randn(3) * torch.zeros(3)).sum().item(),
        lambda: torch.zeros(3).view(3).add_(torch.randn(3))[0].item(),
        lambda: torch.zeros(2**22 + 1)[0].item(),
    ],
)
def test_a_question_about_any_other_value_is_an_error(question):
    with FakeTensorMode(), KnownValues(), pytest.raises(DataDependentOutputException):
        question()


def test_what_was_overwritten_is_forgotten_in_every_view():
    with FakeTensorMode(), KnownValues():
        known = torch.zeros(4)
        view = known[1:]
        assert view.sum().item() == 0
        known[2:].copy_(torch.randn(2))
        for tensor in (known, view):
            with pytest.raises(DataDependentOutputException):
                tensor.sum().item()


def test_entries_of_coo_tensors_are_counted():
    with FakeTensorMode(), KnownValues():
        indices, values = torch.empty(2, 5, dtype=torch.int64), torch.empty(5)
        distinct = torch.sparse_coo_tensor(indices, values, (3, 4), is_coalesced=True, check_invariants=False)
        again = torch.sparse_coo_tensor(distinct._indices(), values, (3, 4), is_coalesced=False, check_invariants=False)
        assert again.coalesce()._nnz() == again.clone()._nnz() == 5
        other = torch.sparse_coo_tensor(indices.clone(), values, (3, 4), is_coalesced=False, check_invariants=False)
        with pytest.raises(UnsupportedFakeTensorException):
            other.coalesce()
        with pytest.raises(UnsupportedFakeTensorException):
            distinct * 2


def test_what_was_tied_stays_tied():
    with torch.device("meta"):
        model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 5), "b": torch.nn.Linear(3, 5)})
        model["b"].weight = model["a"].weight
        model.register_buffer("part", torch.arange(8).expand(2, 8))
        model.register_buffer("again", model.part)
    lay_fakes(model, FakeTensorMode())
    assert all(isinstance(tensor, FakeTensor) for tensor in (*model.parameters(), *model.buffers()))
    assert model["a"].weight is model["b"].weight
    assert model.part is model.again
    assert model.part.untyped_storage().nbytes() == 8 * 8
    assert {tensor.device.type for tensor in model.parameters()} == {"cpu"}
    tracker = Tracker(fake=True)
    tracker.adopt(model)
    assert tracker.live_bytes == 4 * (15 + 5 + 5) + 64


def test_transformers_is_as_it_was_afterwards():
    from transformers import masking_utils

    before = masking_utils.is_tracing
    with FakeTensorMode():
        tensor = torch.zeros(2)
    with not_traced():
        assert not masking_utils.is_tracing(tensor)
    assert masking_utils.is_tracing is before
    assert masking_utils.is_tracing(tensor)


def test_the_extreme_of_a_whole_tensor_tells_of_no_line():
    with FakeTensorMode(), Answers(torch.nn.Linear(3, 2), {"": 3}, True):
        tensor = torch.empty(3, 4)
        assert tensor.amax().shape == tensor.amin().shape == ()
        assert hasattr(tensor.amax(1), "lines_of")
        with pytest.raises(DataDependentOutputException):
            bool(tensor.amax() > 0)
