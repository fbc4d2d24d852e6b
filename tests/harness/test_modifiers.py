"""What changes a step of any method: another optimizer, gradients accumulated over passes, autocast to bfloat16."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from baselines.method import MethodError
from baselines.registry import get, methods
from benchmarks import cli
from benchmarks.harness.errors import InputError
from benchmarks.harness.memory import Tracker
from benchmarks.harness.predict import predict
from benchmarks.harness.protocol import build, forward_backward, mean_loss, ready, track, untracked, update
from benchmarks.harness.spec import RunSpec
from reports.compare import identify
from reports.record import Record
from sparsegrad.folded import FoldedLinear
from sparsegrad.linear import out_of_basis

OPTIMIZERS_THEMSELVES = ("apollo", "galore")
CHOOSE_ENTRIES = ("meprop-unified", "meprop-weight", "sparsegrad", "sparsegrad-folded", "sparsegrad-compact")
PREDICTED = ("full", "lora", "meprop-weight", "sparsegrad", "sparsegrad-core")
D_IN, D_OUT, BATCH, SEQ = 11, 17, 2, 5
LAYER = {"layer": (D_IN, D_OUT), "batch": BATCH, "seq": SEQ}
WEIGHTS = D_OUT * D_IN + D_OUT
BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 41,
    "max_position_embeddings": 12,
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Changes of the config -> the path of a tiny BERT's."""

    def make(**changes):
        path = tmp_path_factory.mktemp("bert") / "config.json"
        path.write_text(json.dumps({**BERT, **changes}))
        return str(path)

    return make


def spec(method, **options):
    budget = 3 if get(method).knob else None
    return RunSpec(**{"method": method, "budget": budget, "calibration_steps": 2, "rounds": 0, **options})


def prepared(a_spec):
    """The state before the first step."""
    workload = a_spec.workload()
    method, model, _ = build(a_spec, workload)
    method.prepare(model, workload.batches())
    return ready(a_spec, workload, method, model)


def accumulated(state, batches):
    """Gradients of a pass of each batch; the mean loss."""
    return mean_loss([forward_backward(state, batch, n, untracked)[1] for n, batch in enumerate(batches)])


def gradients(state):
    """Name -> gradient of what trains, dense."""
    found = {name: p.grad for name, p in state.model.named_parameters() if p.grad is not None}
    return {name: (g.to_dense() if g.is_sparse else g).clone() for name, g in found.items()}


def tracked(a_spec):
    """The fields of the tracked run on real tensors."""
    done = track(a_spec, a_spec.workload(), Tracker())
    return {**done.facts(), **done.peaks()}


def assert_predicted_to_the_byte(a_spec):
    real, predicted = tracked(a_spec), predict(a_spec)
    assert (predicted.status, predicted.reason) == ("ok", None)
    known = {name: value for name, value in real.items() if name not in ("loss_first", "loss_last")}
    assert {name: getattr(predicted, name) for name in known} == known
    return real


# --- SGD


@pytest.mark.parametrize(
    ("method", "impl"),
    [
        *((name, "for-loop") for name in methods() if name not in OPTIMIZERS_THEMSELVES),
        *(("full", impl) for impl in ("foreach", "fused")),
    ],
)
def test_a_step_of_sgd_is_the_gradient(method, impl):
    lr = 0.25
    block = {"block": (D_IN, D_OUT), "batch": BATCH, "seq": SEQ, "dtype": "float64"}
    state = prepared(spec(method, **block, optimizer="sgd", optimizer_impl=impl, lr=lr))
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    accumulated(state, [next(state.workload.batches())])
    expected = gradients(state)
    bases = {f"{n}.weight": m.basis for n, m in state.model.named_modules() if isinstance(m, FoldedLinear)}
    expected |= {name: out_of_basis(expected[name], basis) for name, basis in bases.items()}
    update(state, untracked)
    for name, parameter in state.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.detach(), before[name] - lr * expected[name], rtol=0, atol=1e-12)
    assert not any(optimizer.state for optimizer in state.optimizers)


@pytest.mark.parametrize("method", OPTIMIZERS_THEMSELVES)
def test_a_method_that_is_an_optimizer_takes_no_other(method):
    a_spec = spec(method, **LAYER, optimizer="sgd")
    with pytest.raises(MethodError, match=f"{method} makes its optimizers itself.*leave --optimizer sgd out"):
        build(a_spec, a_spec.workload())
    record = predict(a_spec)
    assert (record.status, record.optimizer) == ("refused", "sgd")
    assert "makes its optimizers itself" in record.reason


@pytest.mark.parametrize("method", PREDICTED)
def test_sgd_keeps_nothing_and_is_predicted(method):
    result = assert_predicted_to_the_byte(spec(method, **LAYER, optimizer="sgd"))
    assert result["optimizer_bytes"] == result["state_params"] == 0


def test_sgd_of_a_layer_leaves_its_weights_alone_resident():
    result = tracked(spec("full", **LAYER, optimizer="sgd"))
    x, y = 4 * BATCH * SEQ * D_IN, 4 * BATCH * SEQ * D_OUT
    assert result["resident_bytes"] == 4 * WEIGHTS
    # X, dL/dY and Y; the gradient of weight and bias; no temporary of the optimizer's.
    assert result["peak_optimizer_bytes"] == 2 * 4 * WEIGHTS + x + 2 * y


# --- AdamW with 8-bit moments

SPARSE = ("meprop-unified", "meprop-weight", "sparsegrad", "sparsegrad-folded", "sparsegrad-compact")


@pytest.mark.parametrize("method", ["full", "lora", "gmt", "random-mask", "sparsegrad-core"])
def test_eight_bits_are_predicted(method):
    """With weights that have whole blocks, weights that have not, and vectors too small for codes."""
    assert_predicted_to_the_byte(spec(method, block=(72, 96), batch=BATCH, seq=SEQ, optimizer="adamw8bit"))


@pytest.mark.parametrize("method", [*OPTIMIZERS_THEMSELVES, *SPARSE])
def test_what_eight_bits_cannot_step_is_refused(method):
    record = predict(spec(method, **LAYER, optimizer="adamw8bit"))
    assert (record.status, record.optimizer) == ("refused", "adamw8bit")
    assert "leave --optimizer adamw8bit out" in record.reason


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bf16-mixed"])
def test_eight_bits_of_a_layer_are_two_bytes_an_entry(dtype):
    d_in, d_out = 256, 96
    result = tracked(spec("full", layer=(d_in, d_out), batch=BATCH, seq=SEQ, dtype=dtype, optimizer="adamw8bit"))
    # Two codes an entry and two magnitudes a block of 256, two tables; moments of the bias in float32.
    weight = 2 * d_out * d_in + 2 * 4 * d_out * d_in // 256 + 2 * 4 * 256
    assert result["optimizer_bytes"] == weight + 2 * 4 * d_out
    assert result["state_params"] == d_out * d_in + d_out
    parameters = (2 if dtype == "bfloat16" else 4) * (d_out * d_in + d_out)
    assert result["resident_bytes"] == parameters + result["optimizer_bytes"]


# --- gradients accumulated


@pytest.mark.parametrize("method", [name for name in methods() if name not in CHOOSE_ENTRIES])
@pytest.mark.parametrize(("kind", "passes"), [("block", 3), ("model", 2)])
def test_micro_batches_are_one_batch_as_large_as_all(kind, passes, method, bert):
    """Of a block the gradients add up, of a model's mean loss they are divided by the number of passes."""
    if kind == "block":
        what = {"block": (D_IN, D_OUT)}
    else:
        what = {"model": bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)}
    small = spec(method, **what, batch=BATCH, seq=SEQ, dtype="float64", accumulate=passes)
    many, one = prepared(small), prepared(replace(small, accumulate=1))
    stream = many.workload.batches()
    batches = [next(stream) for _ in range(passes)]
    if kind == "block":
        whole = tuple(torch.cat([part.detach() for part in parts]) for parts in zip(*batches, strict=True))
    else:
        whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    losses = accumulated(many, batches), accumulated(one, [whole])
    if kind == "model":
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    actual, expected = gradients(many), gradients(one)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-12)
    update(many, untracked)
    update(one, untracked)
    assert all(parameter.grad is None for parameter in many.model.parameters())
    for stepped, by_one in zip(many.model.parameters(), one.model.parameters(), strict=True):
        torch.testing.assert_close(stepped, by_one, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", CHOOSE_ENTRIES)
def test_what_chooses_entries_by_one_pass_is_refused(method):
    record = predict(spec(method, **LAYER, accumulate=2))
    assert (record.status, record.accumulate) == ("refused", 2)
    assert record.reason.startswith(f"{method} chooses entries anew in each backward pass")
    assert predict(spec(method, **LAYER)).status == "ok"


@pytest.mark.parametrize("method", ["full", "lora", "meprop-example", "sparsegrad-core"])
def test_accumulation_is_predicted(method, bert):
    for what in (LAYER, {"model": bert(), "batch": 3, "seq": 6}):
        result = assert_predicted_to_the_byte(spec(method, **what, accumulate=3))
    names = [name for name, _ in json.loads(result["timeline"])["phases"]]
    assert names == ["forward", "backward"] * 3 + ["optimizer", "zero_grad"]


def test_gradients_live_on_between_micro_batches():
    once, twice, thrice = (tracked(spec("full", **LAYER, accumulate=n)) for n in (1, 2, 3))
    # From the second pass on the gradients of weight and bias are there beside all that a single pass has.
    for phase in ("forward", "backward"):
        assert twice[f"peak_{phase}_bytes"] == once[f"peak_{phase}_bytes"] + 4 * WEIGHTS
    for name in ("peak_optimizer_bytes", "resident_bytes", "updated_params"):
        assert twice[name] == once[name]
    peaks = [name for name in twice if name.endswith("_bytes")]
    assert {name: thrice[name] for name in peaks} == {name: twice[name] for name in peaks}


@pytest.mark.parametrize("count", [0, -1, 1025])
def test_numbers_of_passes_that_are_none(count):
    with pytest.raises(InputError, match=f"--accumulate must be from 1 to 1024, got {count}"):
        spec("full", **LAYER, accumulate=count).workload()


# --- autocast to bfloat16


@pytest.mark.parametrize("method", list(methods()))
def test_mixed_gradients_are_those_of_float32(method):
    """As of the same model without autocast. Where entries are chosen, all are: rounding could choose others."""
    cls = get(method)
    budget = 1.0 if cls.knob and cls.knob.accepts_density else None
    if method.startswith("meprop") and budget is None:
        budget = D_OUT
    a_spec = replace(spec(method, **LAYER, dtype="bf16-mixed"), lr=1e-3)
    state = prepared(a_spec if budget is None else replace(a_spec, budget=budget))
    with torch.no_grad():
        for parameter in state.model.parameters():
            # What begins at zero would hide what is multiplied by it.
            if parameter.is_floating_point():
                parameter += 0.1 * torch.randn_like(parameter)
    x, dy = next(state.workload.batches())
    assert (x.dtype, dy.dtype) == (torch.float32, torch.bfloat16)
    found = []
    for mixed in (True, False):
        state.workload.mixed = mixed
        result = state.workload.forward(state.model, (x, dy if mixed else dy.float()))
        y = result.held[0]
        assert y.dtype == (torch.bfloat16 if mixed else torch.float32)
        state.workload.backward(result)
        assert all(p.grad.dtype == torch.float32 for p in state.model.parameters() if p.grad is not None)
        found.append({"y": y.detach().float(), "x": x.grad, **gradients(state)})
        x.grad = None
        state.model.zero_grad(set_to_none=True)
    actual, expected = found
    assert actual.keys() == expected.keys()
    # The error of a sum of rounded terms, by its norm: bfloat16 rounds to 2^-8, and there are fewer than ten roundings.
    for name in expected:
        assert (actual[name] - expected[name]).norm() < 10 * 2**-8 * expected[name].norm(), name


@pytest.mark.parametrize("method", ["full", "lora", "sparsegrad", "sparsegrad-core"])
def test_autocast_leaves_float64_alone(method):
    state = prepared(spec(method, **LAYER, dtype="float64"))
    found = []
    for mixed in (True, False):
        state.workload.mixed = mixed
        result = state.workload.forward(state.model, next(state.workload.batches()))
        state.workload.mixed = False
        found.append(result.held[0].detach())
    assert found[0].dtype == torch.float64
    assert torch.equal(*found)


@pytest.mark.parametrize("method", PREDICTED)
def test_mixed_steps_are_predicted(method, bert):
    block = {"block": (D_IN, D_OUT), "batch": BATCH, "seq": SEQ}
    model = {"model": bert(), "batch": 8, "seq": 8}
    for what in (block, model, {**model, "attention": "eager", "checkpointing": True}):
        assert_predicted_to_the_byte(spec(method, **what, dtype="bf16-mixed"))


def test_a_mixed_layer_keeps_copies_in_bfloat16_of_what_it_multiplies():
    mixed, wide = (tracked(spec("full", **LAYER, dtype=dtype)) for dtype in ("bf16-mixed", "float32"))
    tokens = BATCH * SEQ
    for name in ("parameter_bytes", "optimizer_bytes", "resident_bytes"):
        assert mixed[name] == wide[name]
    # X of the workload in float32, dL/dY and Y in bfloat16; kept for backward are copies of X and of the weight.
    copies = 2 * tokens * D_IN + 2 * D_OUT * D_IN
    forward = wide["resident_bytes"] + 4 * tokens * D_IN + 2 * 2 * tokens * D_OUT + copies
    # While Y is made there is a copy of the bias too.
    assert mixed["peak_forward_bytes"] == forward + 2 * D_OUT


@pytest.mark.parametrize("method", ["full", "lora", "sparsegrad-core"])
def test_activations_of_mixed_blocks_are_smaller(method):
    block = {"block": (24, 40), "batch": 4, "seq": 64}
    mixed, wide = (tracked(spec(method, **block, dtype=dtype)) for dtype in ("bf16-mixed", "float32"))
    assert mixed["parameter_bytes"] == wide["parameter_bytes"]
    # All but the workload's X are halved, and copies of weights, smaller than one tensor here, are new.
    assert 0.5 * wide["activation_bytes"] < mixed["activation_bytes"] < 0.75 * wide["activation_bytes"]
    assert mixed["peak_step_bytes"] < wide["peak_step_bytes"]


@pytest.mark.parametrize("fake", [False, True])
def test_copies_of_weights_stay_until_autocast_ends(fake):
    """One copy for all uses of what trains, beyond a checkpointed forward; one for each use of what is frozen."""
    workload = spec("full", **LAYER, dtype="bf16-mixed").workload()
    with FakeTensorMode() if fake else torch.enable_grad():
        layer, x = nn.Linear(D_IN, D_OUT), torch.empty(SEQ, D_IN)
        for trains, copies in ((True, 1), (False, 0)):
            layer.requires_grad_(trains)
            tracker = Tracker(fake=fake)
            tracker.adopt(layer, x)
            before = tracker.live_bytes
            with tracker:
                with workload.precision():
                    held = [checkpoint(layer, x, use_reentrant=False) for _ in range(2)]
                    inside = tracker.live_bytes
                del held
            assert tracker.live_bytes == before
            assert inside - before == copies * 2 * WEIGHTS + 2 * 2 * SEQ * D_OUT


# --- what it is called


def test_the_options_reach_the_records(capsys):
    command = ["predict", "--layer", "12x20", "--batch", "2", "--seq", "3", "--methods", "full", "--device", "cpu"]
    assert cli.main([*command, "--optimizer", "sgd,adamw", "--accumulate", "2", "--dtype", "bf16-mixed"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [(r["optimizer"], r["accumulate"], r["dtype"], r["batch"]) for r in records] == [
        ("sgd", 2, "bf16-mixed", 2),
        ("adamw", 2, "bf16-mixed", 2),
    ]
    assert all(r["status"] == "ok" for r in records)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizer", "adam"], "--optimizer must be one of adamw, adamw8bit, sgd, got 'adam'"),
        (["--optimizer", "adamw8bit", "--optimizer-impl", "fused"], "--optimizer-impl fused is for adamw and sgd"),
        (["--accumulate", "0"], "--accumulate must be from 1 to 1024, got 0"),
        (["--dtype", "bf16-mixed", "--adapter-dtype", "float32"], "leave --adapter-dtype out"),
        (["--dtype", "fp16-mixed"], "bfloat16, bf16-mixed, float16, float64, which AdamW steps, got 'fp16-mixed'"),
    ],
)
def test_options_that_mean_nothing_are_one_line(options, message, capsys):
    assert cli.main(["predict", "--layer", "12x20", *options]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.strip().splitlines())) == ("", 1)
    assert message in err


def test_records_that_say_nothing_of_modifiers_are_of_the_same_benchmark():
    new = spec("full", **LAYER).blank("layer")
    old = {name: value for name, value in new.to_dict().items() if name not in ("optimizer", "accumulate")}
    assert identify(Record.from_dict(old)) == identify(new)
    for changes in ({"optimizer": "sgd"}, {"accumulate": 2}, {"dtype": "bf16-mixed"}):
        assert identify(replace(new, **changes)) != identify(new)
