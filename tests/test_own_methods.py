"""A method of the user's own, in a file: found by its path, measured, predicted and named like any other."""

from pathlib import Path

import pytest
import torch

from baselines import registry
from baselines.method import MethodError
from benchmarks import cli, predictions
from benchmarks.harness.memory import Tracker
from benchmarks.harness.predict import predict
from benchmarks.harness.protocol import track
from benchmarks.harness.spec import RunSpec
from reports.record import read
from sparsegrad.adapted import adapted_layers

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "scaled_outputs.py"
NAME = f"{EXAMPLE}:ScaledOutputs"
LAYER = ["--layer", "12x20", "--batch", "2", "--seq", "3"]


def test_the_example_is_short_and_says_how_it_is_called():
    lines = EXAMPLE.read_text().splitlines()
    assert len(lines) <= 40
    assert "--method examples/scaled_outputs.py:ScaledOutputs" in EXAMPLE.read_text()


def test_it_is_measured_beside_others(tmp_path):
    out = tmp_path / "out.json"
    options = ["--methods", "full,lora[2]", "--method", NAME, "--device", "cpu", "--rounds", "1", "--timing-span", "0"]
    assert cli.main(["run", *LAYER, *options, "--json", str(out)]) == 0
    records = read(out)
    assert [record.method for record in records] == ["full", "lora", NAME]
    assert [record.status for record in records] == ["ok"] * 3
    own = records[-1]
    assert own.trainable_params == 20 + 20  # a factor and the bias of each output
    assert own.step_time_ratio is not None


@pytest.mark.parametrize("shape", ["layer", "block"])
def test_its_prediction_is_the_tracked_run_and_its_formula_the_bytes(shape):
    spec = RunSpec(method=NAME, **{shape: (12, 20)}, batch=2, seq=3, train_rest="none", rounds=0)
    done = track(spec, spec.workload(), Tracker())
    real, predicted = done.peaks(), predict(spec)
    assert (predicted.status, predicted.reason) == ("ok", None)
    assert {name: getattr(predicted, name) for name in real} == real
    shapes = [(20, 12), (12, 20)] * 2 if shape == "block" else [(20, 12)]
    claimed = [done.state.method.formula(each, 6, torch.float32) for each in shapes]
    assert real["optimizer_bytes"] == sum(each.optimizer for each in claimed) + 4 * len(shapes)  # AdamW's counters


def test_it_becomes_a_plain_layer_that_computes_the_same():
    spec = RunSpec(method=NAME, layer=(12, 20), batch=2, seq=3, lr=0.1)
    done = track(spec, spec.workload(), Tracker())
    x = torch.randn(4, 12)
    trained = done.state.model(x)
    plain = done.state.method.export(done.state.model)
    torch.testing.assert_close(plain(x), trained)
    assert not list(adapted_layers(plain))


def test_all_can_be_asked_for_besides(monkeypatch):
    asked = []
    monkeypatch.setattr(predictions, "predict_command", lambda arguments: asked.append(arguments.methods))
    assert cli.main(["predict", *LAYER, "--method", NAME, "--method", "peft:lora[3]"]) == 0
    assert asked == [f"all,{NAME},peft:lora[3]"]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "Any", "there is no file .*own.py: give FILE.py:CLASS"),
        ("x = 1", "Any", "has no class Any that derives from"),
        ("Any = 3", "Any", "has no class Any that derives from"),
        ("class Any: pass", "Any", "has no class Any that derives from"),
        ("import nothing_of_this_name", "Any", "cannot be run: ModuleNotFoundError: No module named"),
        ("def f(:", "Any", "cannot be run: SyntaxError"),
        ("from baselines.method import Method\nclass Any(Method): pass", "Any", "lacks formula, prepare"),
    ],
)
def test_what_is_no_method_is_refused_in_one_line(content, name, message, tmp_path, capsys):
    path = tmp_path / "own.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(MethodError, match=message):
        registry.from_file(str(path), name)
    assert cli.main(["predict", *LAYER, "--methods", f"{path}:{name}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1


def test_its_budget_is_read(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("from baselines.lora import LoRA\nclass Ten(LoRA):\n    alpha_over_rank = 10.0\n")
    assert registry.parse(f"lora[3],{path}:Ten[4]") == [("lora", 3), (f"{path}:Ten", 4)]
    assert registry.get(f"{path}:Ten").alpha_over_rank == 10.0
    # The class that it derives from keeps its name.
    assert registry.get("lora").name == "lora"
    with pytest.raises(MethodError, match=r"Ten\[0.5\]"):
        registry.get(f"{path}:Ten").check_budget(0.5)


def test_one_that_makes_its_optimizers_itself_takes_no_other(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch\nfrom baselines.lora import LoRA\nclass Mine(LoRA):\n    def optimizers(self, model, lr):\n"
        "        return [torch.optim.RMSprop([p for p in model.parameters() if p.requires_grad], lr)]\n"
    )
    specs = [RunSpec(f"{path}:Mine", 2, layer=(8, 6), batch=1, seq=3, rounds=0, optimizer=o) for o in ("adamw", "sgd")]
    taken, refused = map(predict, specs)
    assert taken.status == "ok"
    assert (refused.status, refused.optimizer) == ("refused", "sgd")
    assert "makes its optimizers itself, for which sgd cannot stand in" in refused.reason
