"""The gates of the training loop: what is run, and what is said of it."""

import json
import math

import pytest

from benchmarks.harness import text
from benchmarks.quality import gates
from benchmarks.quality.gates import GATES, Gate, trial
from benchmarks.quality.study import Study
from benchmarks.quality.tasks import TEST_EXAMPLES, VALIDATION_EXAMPLES
from benchmarks.quality.training import Outcome


@pytest.mark.parametrize(
    ("full", "head", "passed"),
    [(91.0, 81.0, True), (95.0, 85.0, True), (90.9, 50.0, False), (91.0, 81.1, False), (99.0, 99.0, False)],
)
def test_both_bounds_hold(full, head, passed):
    assert Gate("trec", 91.0).passed(full, head) == passed


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.task)
def test_it_is_the_core_studys_loop_on_the_whole_pool(gate):
    packaged = text.load(gate.task)
    pool = sum(map(len, (packaged.train, packaged.validation, packaged.test))) - TEST_EXAMPLES - VALIDATION_EXAMPLES
    found = trial(gate.task, "full")
    assert found.train_size is None
    assert found.steps == gates.EPOCHS * math.ceil(pool / Study().batch)


@pytest.mark.parametrize(("short", "code"), [(0.0, 0), (0.1, 1)])
def test_a_missed_gate_is_told_and_is_the_exit_code(short, code, monkeypatch, tmp_path, capsys):
    def run(asked):
        least = {gate.task: gate.least for gate in GATES}[asked.task]
        missed = short if asked.task == GATES[-1].task else 0.0
        score = least - missed if asked.method == "full" else least - 20.0
        return Outcome(asked, "ok", score=score, predictions=(1.0,), losses=(1.0,), curve=((1, 1.0),))

    monkeypatch.setattr(gates, "run", run)
    path = tmp_path / "gates.json"
    assert gates.main(["--json", str(path)]) == code
    said = capsys.readouterr().err.splitlines()
    assert [line.rsplit(" ", 1)[1] for line in said] == ["reached", "MISSED" if code else "reached"]
    assert [(each["trial"]["method"], each["predictions"]) for each in json.loads(path.read_text())] == [
        ("full", None),
        ("head", None),
    ] * len(GATES)
