"""A whole tiny study through the command line."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cli
from benchmarks.harness import text
from benchmarks.quality import command, tasks, training


@pytest.fixture
def here(monkeypatch):
    """Runs in this process, with 30 test examples and 20 for validation."""
    monkeypatch.setattr(tasks, "TEST_EXAMPLES", 30)
    monkeypatch.setattr(tasks, "VALIDATION_EXAMPLES", 20)
    monkeypatch.setattr(text, "load", functools.cache(text.load))
    worker = SimpleNamespace(run=lambda trial: training.run(trial), close=lambda: None)
    monkeypatch.setattr(command, "TrialWorker", lambda limit: worker)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_study_is_begun_goes_on_and_ends(model, here, tmp_path, monkeypatch, capsys):
    arguments = ["quality", "--out", str(tmp_path / "study"), "--model", model, "--tasks", "amazon", "--arms", "head"]
    arguments += ["--train-size", "16", "--epochs", "2", "--seeds", "2"]
    runs, summary = tmp_path / "study" / "runs.jsonl", tmp_path / "study" / "summary.json"

    assert cli.main([*arguments, "--minutes", "1e-9"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads(summary.read_text())
    assert json.loads(out)["runs"]["settled"] == 0
    assert "not complete: the same command goes on" in err
    assert len(runs.read_text().splitlines()) == 1

    monkeypatch.setattr(command, "records", lambda *_: pytest.fail("predicted again"))
    assert cli.main([*arguments, "--json", str(tmp_path / "copy.json")]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "not complete" not in err
    assert (tmp_path / "copy.json").read_bytes() == summary.read_bytes()
    lines = [json.loads(line) for line in runs.read_text().splitlines()[1:]]
    assert [line["trial"]["purpose"] for line in lines] == ["tuning"] * 8 + ["final"] * 2
    assert {line["status"] for line in lines} == {"ok"}
    assert [line["trial"]["steps"] for line in lines] == [2] * 10
    by_lr = {line["trial"]["lr"]: [] for line in lines}
    for line in lines[:8]:
        by_lr[line["trial"]["lr"]].append(line)
    best = max(by_lr, key=lambda lr: (sum(x["score"] for x in by_lr[lr]), -sum(x["losses"][-1] for x in by_lr[lr])))
    found = json.loads(summary.read_text())
    (arm,) = found["arms"]
    (of,) = arm["tasks"]
    assert of["lr"] == best
    assert of["scores"] == {str(line["trial"]["seed"]): line["score"] for line in lines[8:]}
    assert [len(line["predictions"]) for line in lines[8:]] == [30, 30]
    assert found["primary"] is None

    before = runs.read_bytes(), summary.read_bytes()
    monkeypatch.setattr(training, "run", lambda trial: pytest.fail("ran again"))
    assert cli.main(arguments) == 0
    assert (runs.read_bytes(), summary.read_bytes()) == before


def test_a_study_of_a_users_own_method_at_rates_of_their_own(model, here, tmp_path, capsys):
    mine = f"{Path(__file__).parents[2] / 'examples' / 'scaled_outputs.py'}:ScaledOutputs"
    arguments = ["quality", "--out", str(tmp_path), "--model", model, "--tasks", "amazon", "--arms", f"lora,{mine}"]
    arguments += ["--lrs", "0.001, 0.05", "--train-size", "16", "--epochs", "1", "--seeds", "2"]
    assert cli.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(arm["arm"], arm["method"], arm["budget"], arm["matched"]) for arm in found["arms"]] == [
        ("lora", "lora", 7, "parameters"),
        (mine, mine, None, "none"),
    ]
    for arm in found["arms"]:
        (of,) = arm["tasks"]
        assert list(of["tuning"]) == ["0.001", "0.05"]
        assert len(of["scores"]) == 2
    (comparison,) = found["secondary"]
    assert (comparison["first"], comparison["second"]) == (mine, "lora")
    assert comparison["difference"] == pytest.approx(
        found["arms"][1]["mean"]["score"] - found["arms"][0]["mean"]["score"]
    )
