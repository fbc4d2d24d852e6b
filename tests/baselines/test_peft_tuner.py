"""Tuners of peft's as methods: what trains, what is kept, what is predicted, and what is refused."""

import sys

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from baselines.method import MethodError, Setting
from baselines.peft_tuner import ADALORA_STEPS, tuner_method
from baselines.registry import get, parse
from benchmarks.harness.memory import Tracker
from benchmarks.harness.predict import predict
from benchmarks.harness.protocol import track
from benchmarks.harness.spec import RunSpec

peft = pytest.importorskip("peft")

D_IN, D_OUT, R = 16, 24, 4
# Entries that train in a layer of (D_OUT, D_IN), by the tuners' papers.
TRAINED = {
    "lora": R * (D_IN + D_OUT),
    "rslora": R * (D_IN + D_OUT),
    "pissa": R * (D_IN + D_OUT),
    "dora": R * (D_IN + D_OUT) + D_OUT,
    "vera": R + D_OUT,
    "shira": R * (D_IN + D_OUT),
    "adalora": 6 * (D_IN + D_OUT) + 6,  # half as many again as are left in the end
    "loha": 2 * R * (D_IN + D_OUT),
    "miss": R * D_OUT,
    "fourierft": R,
    "oft": D_IN // R * R * (R - 1) // 2,
    "hra": R * D_IN,
    "ia3": D_IN,  # the layer's input is scaled where the layer is an MLP's second
}
KEPT = {"vera"}


def applied(name, model=None, **setting):
    """A method on both layers of a small MLP, and the MLP."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(D_OUT, D_IN), nn.GELU(), nn.Linear(D_IN, D_OUT))
    layers = {"up": ["0"], "down": ["2"]}
    cls = tuner_method(f"peft:{name}")
    method = cls(None if cls.knob is None else R, Setting(layers, **{"train_rest": "none", **setting}))
    method.prepare(model, iter(()))
    return method, model


@pytest.mark.parametrize("name", TRAINED)
def test_what_trains_is_what_the_paper_says(name):
    method, model = applied(name)
    trained = sum(p.numel() for name, p in model[2].named_parameters() if p.requires_grad)
    assert method.layer_params((D_OUT, D_IN)) == trained == TRAINED[name]
    assert bool(list(method.basis_tensors(model))) >= (name in KEPT)
    claimed = method.formula((D_OUT, D_IN), 5, torch.float32)
    assert (claimed.gradient, claimed.optimizer) == (4 * trained, 8 * trained)
    assert claimed.parameter == 4 * (D_OUT * D_IN + trained)


@pytest.mark.parametrize("name", TRAINED)
def test_it_trains_and_merges_into_plain_layers(name):
    method, model = applied(name)
    frozen = {key: p.clone() for key, p in model.named_parameters() if not p.requires_grad}
    x = torch.randn(9, D_OUT)
    before = model(x).detach()
    (optimizer,) = method.optimizers(model, 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) ** 2).sum().backward()
        optimizer.step()
        method.after_step(model)
    assert all(torch.equal(p, frozen[key]) for key, p in model.named_parameters() if key in frozen)
    trained = model.eval()(x).detach()
    assert float((trained**2).sum()) < 0.999 * float((before**2).sum())
    plain = method.export(model)
    assert [type(layer) for layer in plain] == [nn.Linear, nn.GELU, nn.Linear]
    torch.testing.assert_close(plain(x), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "dora", "pissa", "vera", "ia3", "oft", "miss", "hra"])
def test_a_prediction_is_the_tracked_run(name):
    budget = None if tuner_method(f"peft:{name}").knob is None else R
    spec = RunSpec(f"peft:{name}", budget, block=(D_IN, D_OUT), batch=2, seq=3, rounds=0, train_rest="none")
    done = track(spec, spec.workload(), Tracker())
    real, predicted = {**done.facts(), **done.peaks()}, predict(spec)
    assert (predicted.status, predicted.reason) == ("ok", None)
    assert {n: getattr(predicted, n) for n in real if "loss" not in n} == {
        n: value for n, value in real.items() if "loss" not in n
    }


def test_what_hangs_on_values_is_refused_where_nothing_has_any():
    record = predict(RunSpec("peft:adalora", R, block=(D_IN, D_OUT), batch=2, seq=3, rounds=0))
    assert (record.status, record.peak_step_bytes) == ("refused", None)


def test_peft_and_our_lora_hold_the_same_between_steps_and_ours_needs_no_more():
    records = [
        predict(RunSpec(name, R, block=(32, 64), batch=4, seq=16, rounds=0, train_rest="none"))
        for name in ("lora", "peft:lora")
    ]
    ours, theirs = records
    for same in ("resident_bytes", "trainable_params", "state_params", "budget_params", "optimizer_bytes"):
        assert getattr(ours, same) == getattr(theirs, same)
    assert ours.peak_step_bytes <= theirs.peak_step_bytes


def test_peft_and_our_lora_compute_the_same():
    (_, ours), (_, theirs) = (applied_by(name) for name in ("lora", "peft:lora"))
    with torch.no_grad():
        for own, other in ((ours[0], theirs[0]), (ours[2], theirs[2])):
            own.lora_B.normal_()
            other.lora_A["default"].weight.copy_(own.lora_A)
            other.lora_B["default"].weight.copy_(own.lora_B)
    x = torch.randn(5, D_OUT)
    torch.testing.assert_close(ours(x), theirs(x))


def applied_by(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_OUT, D_IN), nn.GELU(), nn.Linear(D_IN, D_OUT))
    method = get(name)(R, Setting({"up": ["0"], "down": ["2"]}, train_rest="none"))
    method.prepare(model, iter(()))
    return method, model


# --- LoRA on bitsandbytes' 4-bit layers


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="the extra [bitsandbytes] is not installed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_our_lora_on_the_weights_in_four_bits(dtype, bitsandbytes):
    models = []
    for name in ("lora", "peft:qlora"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 96), nn.GELU(), nn.Linear(96, 128)).to(dtype)
        get(name)(R, Setting({"up": ["0"], "down": ["2"]}, train_rest="none")).prepare(model, iter(()))
        models.append(model)
    ours, theirs = models
    with torch.no_grad():
        for own, other in ((ours[0], theirs[0]), (ours[2], theirs[2])):
            stored = other.base_layer.weight
            own.weight.copy_(bitsandbytes.functional.dequantize_4bit(stored.data, stored.quant_state))
            own.lora_B.normal_()
            other.lora_A["default"].weight.copy_(own.lora_A)
            other.lora_B["default"].weight.copy_(own.lora_B)
    x = torch.randn(5, 128, dtype=dtype)
    # An evaluation first: it leaves layers as they are.
    with torch.no_grad():
        theirs.eval()(x)
    theirs.train()
    found = []
    for model in models:
        given = x.clone().requires_grad_()
        y = model(given)
        y.square().sum().backward()
        found.append([y.detach(), given.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for actual, expected in zip(*found, strict=True):
        assert (actual - expected).float().norm() < bound * expected.float().norm()


def test_our_qlora_stores_what_bitsandbytes_does(bitsandbytes):
    options = {"block": (64, 128), "batch": 4, "seq": 16, "rounds": 0, "train_rest": "none"}
    ours, theirs = (
        (lambda done: {**done.facts(), **done.peaks()})(track(spec, spec.workload(), Tracker()))
        for spec in (RunSpec(name, R, **options) for name in ("qlora", "peft:qlora"))
    )
    for same in ("trainable_params", "state_params", "budget_params", "optimizer_bytes"):
        assert ours[same] == theirs[same]
    # Each of its four layers has tables of its own, of 16 and 256 float32, and the library one; ours share theirs, and
    # have one of pairs.
    tables = 4 * (4 * (16 + 256) + 256)
    assert theirs["resident_bytes"] - ours["resident_bytes"] == tables - 4 * (16 + 256 + 2 * 256)


def test_four_bits_are_not_predicted_nor_merged_nor_put_in_a_conv1d(bitsandbytes):
    record = predict(RunSpec("peft:qlora", R, block=(D_IN, D_OUT), batch=2, seq=3, rounds=0))
    assert record.status == "refused"
    assert record.reason.startswith("peft:qlora is measured, and not predicted")
    method, model = applied("qlora")
    with pytest.raises(MethodError, match="peft:qlora cannot be merged into plain layers"):
        method.export(model)
    model = nn.Sequential(nn.Linear(D_OUT, D_IN), nn.GELU(), Conv1D(D_OUT, D_IN))
    before = list(model)
    with pytest.raises(MethodError, match="bitsandbytes has no 4-bit Conv1D, which 2 is"):
        applied("qlora", model)
    assert list(model) == before


def test_without_bitsandbytes_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    tuner_method.cache_clear()
    with pytest.raises(MethodError, match=r"peft:qlora needs bitsandbytes, an optional extra.*or take qlora"):
        tuner_method("peft:qlora")


def test_adapters_have_the_dtype_that_the_setting_says():
    for adapter_dtype, expected in (("same", torch.bfloat16), ("float32", torch.float32)):
        model = nn.Sequential(nn.Linear(D_OUT, D_IN), nn.GELU(), nn.Linear(D_IN, D_OUT)).to(torch.bfloat16)
        _, model = applied("lora", model, adapter_dtype=adapter_dtype)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
        model(torch.randn(3, D_OUT, dtype=torch.bfloat16)).sum().backward()


def test_new_weights_come_from_the_seed_and_leave_the_global_one_alone():
    drawn = []
    for seed in (3, 3, 4):
        model = nn.Sequential(nn.Linear(D_OUT, D_IN), nn.GELU(), nn.Linear(D_IN, D_OUT))
        method = get("peft:lora")(R, Setting({"up": ["0"], "down": ["2"]}, seed=seed))
        torch.manual_seed(11)
        method.prepare(model, iter(()))
        drawn.append((model[0].lora_A["default"].weight, torch.rand(2)))
    (first, after), (same, after_same), (other, after_other) = drawn
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    torch.manual_seed(11)
    untouched = torch.rand(2)
    assert all(torch.equal(each, untouched) for each in (after, after_same, after_other))


def test_a_configuration_that_peft_saved(tmp_path):
    peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["query"]).save_pretrained(tmp_path)
    name = f"peft:{tmp_path / 'adapter_config.json'}"
    assert parse(f"full,{name}") == [("full", None), (name, None)]
    _, model = applied(name.removeprefix("peft:"))
    adapter = model[0]
    assert (adapter.r["default"], adapter.scaling["default"]) == (3, 5 / 3**0.5)
    # It holds the whole configuration: there is nothing to choose.
    with pytest.raises(MethodError, match="has no budget"):
        get(name)(7, Setting({}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("[", "cannot be read"),
        ("[]", "has no peft_type"),
        ('{"r": 3}', "has no peft_type"),
        ('{"peft_type": "NOPE"}', "peft has no tuner 'nope'"),
        ('{"peft_type": "LORA", "rank": 3}', "has no option 'rank'"),
        ('{"peft_type": 3}', "peft has no tuner '3'"),
    ],
)
def test_what_is_no_configuration(content, message, tmp_path):
    path = tmp_path / "adapter_config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(MethodError, match=message):
        tuner_method(f"peft:{path}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nosuch", "peft has no tuner 'nosuch', asked for as peft:nosuch; it has adalora, .*vera"),
        ("", "peft has no tuner ''"),
        ("LORA", "peft has no tuner 'LORA'"),
        ("prompt_tuning", "peft:prompt_tuning does not act on linear layers"),
        ("trainable_tokens", "peft:trainable_tokens does not act on linear layers"),
    ],
)
def test_an_unknown_tuner_is_refused_in_one_line(name, message):
    with pytest.raises(MethodError, match=message) as error:
        get(f"peft:{name}")
    assert "\n" not in str(error.value)


def test_a_tuner_that_a_layer_cannot_take_says_so_and_what_peft_says():
    with pytest.raises(MethodError, match=r"peft:road cannot be applied: .*divisible") as error:
        applied("road")
    assert "\n" not in str(error.value)


def test_a_tuner_that_cannot_be_merged():
    method, model = applied("lily")
    with pytest.raises(MethodError, match="peft:lily cannot be merged into plain layers"):
        method.export(model)


def test_adalora_starts_with_half_as_many_again_and_has_an_end():
    method, _ = applied("adalora")
    config = method._tuner.peft_config["default"]
    assert (config.target_r, config.init_r, config.total_step) == (R, 6, ADALORA_STEPS)


def test_without_peft_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft.mapping", None)
    with pytest.raises(MethodError, match="peft:lokr needs peft, an optional extra"):
        tuner_method("peft:lokr")
