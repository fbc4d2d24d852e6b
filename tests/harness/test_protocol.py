"""The measured run: closed forms, the allocator as a witness, determinism, leaks."""

import json
import math
import pickle
from functools import cache

import pytest
import torch

from baselines import nf4
from baselines.full import Full
from baselines.registry import get, methods
from benchmarks.harness import protocol
from benchmarks.harness.memory import AllocatorTrace, Tracker, steady_collection
from benchmarks.harness.plain import PlainPass
from benchmarks.harness.protocol import (
    Diverged,
    build,
    measure_memory,
    ready,
    state_params,
    training_step,
    untracked,
)
from benchmarks.harness.spec import RunSpec
from benchmarks.harness.turns import measure_all
from reports.record import BREAKDOWN, PEAKS
from reports.timeline import Timeline

CORE = list(methods())
# A budget that the small shapes can take, for methods that have one.
BUDGET = {name: (3 if cls.knob else None) for name, cls in methods().items()}
LAYER = {"layer": (37, 53), "batch": 3, "seq": 11}
BLOCK = {"block": (48, 96), "batch": 2, "seq": 16}
ENCODER = {"model": "minilm-l6", "batch": 4, "seq": 32}


# What LAPACK's `syevd` asks for beside a D x D matrix, 1 + 6 D + 2 D^2 numbers and 3 + 5 D integers of 4 bytes: GaLore
# decomposes in a step, in the smaller side of a weight, and no tracker sees it.
LAPACK = {"galore": lambda d: 4 * (1 + 6 * d + 2 * d**2 + 3 + 5 * d)}


def assert_agrees(method, result, smaller_side):
    """Tracker and allocator are as one within a thousandth, but for what LAPACK takes inside an operation."""
    beyond = LAPACK[method](smaller_side) if method in LAPACK else 0
    slack = 1e-3 * result["peak_step_bytes"]
    assert -slack <= result["kernel_workspace_bytes"] <= beyond + slack


def spec(method, **options):
    options = {"calibration_steps": 2, "rounds": 0, **options}
    return RunSpec(method=method, budget=BUDGET[method], **options)


def memory(a_spec):
    return measure_memory(a_spec, a_spec.workload())


@pytest.fixture(scope="module")
def encoder_memory():
    """method -> its fields on the encoder, measured once."""
    return cache(lambda method: memory(spec(method, **ENCODER)))


@pytest.mark.parametrize("rest", ["all", "none"])
@pytest.mark.parametrize("shape", [LAYER, BLOCK], ids=["layer", "block"])
@pytest.mark.parametrize("method", CORE)
def test_the_tracker_agrees_with_the_allocator(method, shape, rest):
    assert_agrees(method, memory(spec(method, train_rest=rest, **shape)), min(next(iter(shape.values()))))


@pytest.mark.parametrize("method", CORE)
def test_the_tracker_agrees_with_the_allocator_on_the_encoder(method, encoder_memory):
    result = encoder_memory(method)
    assert_agrees(method, result, 384)
    assert sum(result[name] for name in BREAKDOWN) == result["peak_step_bytes"]
    assert result["resident_bytes"] < result["peak_eval_bytes"] <= result["peak_step_bytes"]


TINY = {
    "bert": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},  # Conv1D, tied embeddings
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}


# LLaMA's layers have no biases: bitfit refuses them.
@pytest.mark.parametrize(
    ("model_type", "method"),
    [(model, method) for model in TINY for method in CORE if (model, method) != ("llama", "bitfit")],
)
def test_the_tracker_agrees_with_the_allocator_on_tiny_models(model_type, method, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": model_type, "vocab_size": 211, **TINY[model_type]}))
    # Three rows reach BERT's last layers, so that dropout makes whole stripes of dL/dY zero: the trace must see the
    # same ones as the tracker.
    assert_agrees(method, memory(spec(method, model=str(path), batch=3, seq=24)), 32)


@pytest.mark.parametrize("rest", ["all", "none"])
@pytest.mark.parametrize("method", CORE)
def test_the_breakdown_adds_up(method, rest):
    for shape in (LAYER, BLOCK):
        result = memory(spec(method, train_rest=rest, **shape))
        assert sum(result[name] for name in BREAKDOWN) == result["peak_step_bytes"]
        assert max(result[name] for name in PEAKS) == result["peak_step_bytes"]
        assert result[f"peak_{result['peak_phase']}_bytes"] == result["peak_step_bytes"]


@pytest.mark.parametrize("method", CORE)
def test_the_timeline_shows_every_peak_and_ends_as_it_began(method, encoder_memory):
    for result in (memory(spec(method, **BLOCK)), encoder_memory(method)):
        timeline = Timeline.loads(result["timeline"], BREAKDOWN)
        step = ["forward", "backward", "optimizer", "zero_grad"]
        assert [name for name, _ in timeline.phases] == step * get(method).period
        assert len(timeline.at) <= protocol.TIMELINE_SAMPLES
        assert max(timeline.totals) == result["peak_step_bytes"]
        assert timeline.totals[0] == timeline.totals[-1] > result["resident_bytes"]  # the batch is held
        at_peak = timeline.totals.index(result["peak_step_bytes"])
        assert {name: timeline.by_category[name][at_peak] for name in BREAKDOWN} == {n: result[n] for n in BREAKDOWN}
        started = [name for name, start in timeline.phases if start < timeline.at[at_peak]]
        assert started[-1] == result["peak_phase"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_workspace_is_the_allocators_excess_over_the_tracker(dtype):
    """A witness of its own: a step under the trace alone, in another build, has tracker plus workspace as its peak."""
    a_spec = spec("sparsegrad", dtype=dtype, **BLOCK)
    result = memory(a_spec)
    workload = a_spec.workload()
    method, model, _ = build(a_spec, workload)
    method.prepare(model, workload.batches())
    state = ready(a_spec, workload, method, model)
    batch = next(workload.batches())
    for _ in range(2):
        training_step(state, batch, untracked)
    tracker = Tracker()
    tracker.adopt(model, *state.optimizers, batch)
    with steady_collection(), AllocatorTrace() as trace:
        training_step(state, batch, untracked)
    assert trace.left_bytes == 0
    assert tracker.live_bytes + trace.peak_bytes == result["peak_step_bytes"] + result["kernel_workspace_bytes"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", ["lora", "random-mask", "sparsegrad"])
def test_preparation_workspace_is_the_allocators_excess_too(method, dtype):
    """Two more builds: one prepared under the tracker alone, one under the trace alone."""
    a_spec = spec(method, dtype=dtype, **BLOCK)
    peaks = []
    for watch in (Tracker(), AllocatorTrace()):
        workload = a_spec.workload()
        method_, model, _ = build(a_spec, workload)
        if isinstance(watch, Tracker):
            watch.adopt(model)
        start = watch.position if isinstance(watch, Tracker) else None
        with steady_collection(), watch:
            method_.prepare(model, workload.batches())
        peaks.append(watch.peak_bytes if start is None else watch.peak_of_born(start))
    assert memory(a_spec)["preparation_workspace_bytes"] == peaks[1] - peaks[0]


@pytest.mark.parametrize("method", [name for name in methods() if name.startswith("sparsegrad")])
def test_a_preparation_of_more_steps_holds_no_more(method):
    few, many = (memory(spec(method, **BLOCK, calibration_steps=steps)) for steps in (3, 12))
    assert few["peak_preparation_bytes"] == many["peak_preparation_bytes"]


def test_full_fine_tuning_of_a_layer_has_the_closed_form():
    d_in, d_out, tokens = 37, 53, 33
    result = memory(spec("full", **LAYER))
    weights = 4 * (d_out * d_in + d_out)
    x, y = 4 * tokens * d_in, 4 * tokens * d_out
    resident = 3 * weights + 2 * 4  # weight and bias, two moments, AdamW's two step counters
    held = resident + x + 2 * y  # X, Y, dL/dY
    assert result["resident_bytes"] == resident
    assert result["peak_forward_bytes"] == held
    assert result["peak_backward_bytes"] == held + weights + x  # dL/dW, dL/db, dL/dX
    # AdamW's loop holds the root of the second moment and its corrected copy, of the weight's size each.
    assert result["peak_optimizer_bytes"] == held + weights + 2 * 4 * d_out * d_in
    assert result["peak_eval_bytes"] == held
    assert result["peak_preparation_bytes"] == weights


def test_the_breakdown_of_full_fine_tuning_is_what_it_says():
    d_in, d_out, tokens = 37, 53, 33
    result = memory(spec("full", **LAYER))
    weights = 4 * (d_out * d_in + d_out)
    assert result["peak_phase"] == "optimizer"
    assert result["parameter_bytes"] == weights
    assert result["gradient_bytes"] == weights
    assert result["optimizer_bytes"] == 2 * weights + 8
    assert result["activation_bytes"] == 4 * tokens * (d_in + 2 * d_out)
    assert result["temporary_bytes"] == 2 * 4 * d_out * d_in
    assert result["basis_bytes"] == 0


def test_sparsegrad_pays_for_its_bases_and_its_dense_moments():
    d_in, d_out = 37, 53
    result = memory(spec("sparsegrad", **LAYER))
    weights, bias = 4 * d_out * d_in, 4 * d_out
    bases = 4 * (d_in**2 + d_out**2)
    # W~ with two DENSE moments, U and V; the bias with two moments and AdamW's step counter.
    assert result["resident_bytes"] == 3 * weights + bases + 3 * bias + 4
    assert result["basis_bytes"] == bases


class Moving(Full):
    """Full fine-tuning that keeps 1000 floats beside the model, new ones in every step."""

    name = "moving"
    period = 2

    def prepare(self, model, batches):
        super().prepare(model, batches)
        self.after_step(model)

    def after_step(self, model):
        model.register_buffer("moving", torch.zeros(1000))

    def basis_tensors(self, model):
        yield model.moving


def test_what_a_step_replaces_keeps_its_category(monkeypatch):
    plain = memory(spec("full", **LAYER))
    monkeypatch.setattr(protocol, "get", lambda _: Moving)
    result = memory(spec("full", **LAYER))
    assert result["resident_bytes"] == plain["resident_bytes"] + 4000
    assert result["basis_bytes"] == 4000
    assert result["temporary_bytes"] == plain["temporary_bytes"]
    assert result["activation_bytes"] == plain["activation_bytes"]


def test_the_moments_of_a_scalar_are_one_entry():
    scale, weight = torch.nn.Parameter(torch.ones(())), torch.nn.Parameter(torch.ones(3, 5))
    optimizer = torch.optim.AdamW([scale, weight])
    for parameter in (scale, weight):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert state_params([optimizer]) == 1 + 15
    assert state_params([torch.optim.SGD([scale, weight], lr=0.1)]) == 0


@pytest.mark.parametrize("method", CORE)
def test_fifty_steps_leak_nothing(method):
    a_spec = spec(method, **BLOCK)
    workload = a_spec.workload()
    method_, model, _ = build(a_spec, workload)
    method_.prepare(model, workload.batches())
    state = ready(a_spec, workload, method_, model)
    batches = workload.batches()
    tracker = Tracker()
    with tracker:
        for _ in range(3):
            training_step(state, next(batches), tracker.phase)
        # No collector run in between: a cycle would show as a leak.
        with steady_collection():
            before = tracker.live_bytes
            for _ in range(50):
                training_step(state, next(batches), tracker.phase)
            assert tracker.live_bytes == before


@pytest.mark.parametrize("method", CORE)
def test_two_runs_are_identical(method, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "bert", "vocab_size": 211, **TINY["bert"]}))  # with its dropout
    a_spec = spec(method, model=str(path), batch=3, seq=24)
    assert memory(a_spec) == memory(a_spec)


@pytest.mark.parametrize("method", ["lora", "sparsegrad-core"])
def test_two_runs_of_the_encoder_are_identical(method, encoder_memory):
    assert memory(spec(method, **ENCODER)) == encoder_memory(method)


def test_every_method_starts_from_the_same_outputs_and_batch(encoder_memory):
    results = [encoder_memory(method) for method in CORE]
    losses = {method: result["loss_first"] for method, result in zip(CORE, results, strict=True)}
    first = losses["full"]
    # Four bits move the outputs, a little.
    assert 1e-5 * first < abs(losses.pop("qlora") - first) < 0.01 * first
    assert losses == pytest.approx(dict.fromkeys(losses, first), rel=1e-5)
    assert len({result["padding_fraction"] for result in results}) == 1
    assert 0 < results[0]["padding_fraction"] < 1


@pytest.mark.parametrize("method", CORE)
def test_counts(method):
    d_in, d_hidden = BLOCK["block"]
    layers, weight, k, steps = 4, d_in * d_hidden, 3, 2 + 2 * get(method).period
    biases = 2 * (d_in + d_hidden)
    a_spec = spec(method, lr=1e-2, **BLOCK)
    plain = PlainPass(a_spec, a_spec.workload())
    for _ in range(2):
        plain.round()
    result = {**memory(a_spec), **plain.finish()}
    own = {
        # trainable, updated, state, budget: entries in the four weights together
        "full": (layers * weight, layers * weight, layers * weight, None),
        "head": (0, 0, 0, None),
        "lora": (layers * k * (d_in + d_hidden),) * 4,
        "pissa": (layers * k * (d_in + d_hidden),) * 4,
        "qlora": (layers * k * (d_in + d_hidden),) * 4,
        "dora": (layers * k * (d_in + d_hidden) + 2 * (d_in + d_hidden),) * 4,
        "lora-fa": (2 * k * (d_in + d_hidden),) * 4,
        "lora-xs": (layers * k * k,) * 4,
        "vera": (layers * k + 2 * (d_in + d_hidden),) * 4,
        # The biases, which the rest of the model has too.
        "bitfit": (0, 0, 0, None),
        # AdamW writes what is masked too.
        "gmt": (layers * weight, layers * weight, layers * weight, layers * k),
        "sift": (layers * k,) * 4,
        # Blocks of 48 x 48, in all layers together.
        "smt": (k * 48**2,) * 4,
        "galore": (layers * weight, layers * weight, layers * k * d_hidden, layers * k * d_hidden),
        "apollo": (layers * weight, layers * weight, layers * k * d_hidden, layers * k * d_hidden),
        "meprop-example": (layers * weight, layers * weight, layers * weight, 2 * k * (d_in + d_hidden)),
        "meprop-unified": (layers * weight, 2 * k * (d_in + d_hidden), layers * weight, 2 * k * (d_in + d_hidden)),
        "meprop-weight": (layers * weight, layers * k, layers * weight, layers * k),
        "random-mask": (layers * k,) * 4,
        "sparsegrad": (layers * weight, layers * k, layers * weight, layers * k),
        # All of W moves; counted are the entries of the step, in the basis.
        "sparsegrad-folded": (layers * weight, layers * k, layers * weight, layers * k),
        "sparsegrad-core": (layers * k,) * 4,
        "sparsegrad-directions": (2 * k * (d_in + d_hidden),) * 4,
        "sparsegrad-fixed": (layers * k,) * 4,
        # Moments for four times the entries of a step.
        "sparsegrad-compact": (layers * weight, layers * k, layers * 4 * k, layers * k),
    }[method]
    rest = 0 if method == "head" else biases
    assert result["trainable_params"] == own[0] + rest
    assert result["updated_params"] == own[1] + rest
    assert result["state_params"] == own[2] + rest
    assert result["budget_params"] == own[3]
    assert result["touched_steps"] == steps
    if method in ("sparsegrad", "sparsegrad-compact", "meprop-weight"):
        assert layers * k + rest <= result["touched_params"] <= steps * layers * k + rest
    elif method == "sparsegrad-folded":
        assert steps * layers * k + rest < result["touched_params"] <= layers * weight + rest
    elif method == "gmt":
        assert layers * k + rest <= result["touched_params"] <= steps * layers * k + rest
    elif method in ("lora", "random-mask", "sparsegrad-core", "sparsegrad-directions", "sparsegrad-fixed", "head"):
        assert result["touched_params"] == own[0] + rest
    elif method in ("sift", "smt", "galore", "apollo"):
        assert result["touched_params"] == own[0] + rest


def test_a_loss_that_is_not_finite_diverges():
    a_spec = spec("full", **{**ENCODER, "lr": 1e30})
    with pytest.raises(Diverged, match="loss"):
        memory(a_spec)


def test_bfloat16_runs_for_every_method():
    for method in CORE:
        result = memory(spec(method, dtype="bfloat16", **BLOCK))
        half = memory(spec(method, dtype="float32", **BLOCK))
        narrow, wide = result["resident_bytes"], half["resident_bytes"]
        if method == "qlora":
            # Four weights and the tables, in bits of their own in either dtype.
            stored = 4 * nf4.stored_bytes(math.prod(BLOCK["block"])) + 4 * (16 + 256 + 2 * 256)
            narrow, wide = narrow - stored, wide - stored
        # Half the bytes for what is a float; indices and counters stay.
        assert 0.5 * wide <= narrow <= 0.55 * wide


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bf16-mixed"])
@pytest.mark.parametrize("method", CORE)
def test_cuda_run(method, dtype):
    records = []
    a_spec = spec(method, device="cuda", dtype=dtype, **{**BLOCK, "rounds": 2})
    measure_all([a_spec], None, lambda _, record, seconds: records.append(record))
    (record,) = records
    assert record.status == "ok"
    assert record.device_semantics == "cuda"
    assert record.peak_requested_bytes <= record.peak_step_bytes <= record.peak_reserved_bytes
    assert 0 < record.resident_bytes < record.peak_eval_bytes <= record.peak_step_bytes
    assert sum(getattr(record, name) for name in BREAKDOWN) == record.peak_step_bytes
    assert record.temporary_bytes >= 0
    assert record.kernel_workspace_bytes >= 0
    assert (record.alloc_retries, record.alloc_ooms) == (0, 0)
    # None where the driver does not list this process, as in some containers.
    assert record.nvml_process_bytes is None or record.nvml_process_bytes >= record.peak_reserved_bytes


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_snapshot(tmp_path):
    path = tmp_path / "steps.pickle"
    memory(spec("full", device="cuda", snapshot=str(path), **BLOCK))
    with open(path, "rb") as file:
        snapshot = pickle.load(file)
    assert snapshot["segments"]
    assert {"alloc", "free_completed"} <= {entry["action"] for trace in snapshot["device_traces"] for entry in trace}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_bytes_do_not_depend_on_a_plain_pass_before():
    a_spec = spec("lora", device="cuda", **BLOCK)
    alone = memory(a_spec)
    plain = PlainPass(a_spec, a_spec.workload())
    plain.round()
    plain.finish()
    again = memory(a_spec)
    # The context and the libraries that the driver charges stay for good.
    same = [name for name in alone if name.endswith("_bytes") and name != "nvml_process_bytes"]
    assert {name: again[name] for name in same} == {name: alone[name] for name in same}
