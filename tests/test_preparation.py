"""What a preparation takes beyond its passes: the command on a tiny block."""

import json

import pytest

from benchmarks.harness.spec import RunSpec
from benchmarks.harness.workload import BlockWorkload
from benchmarks.preparation import PASSES, main, measured

TINY = ["--block", "16x24", "--batch", "2", "--seq", "4", "--calibration-steps", "2"]


def test_each_forms_row_adds_up_and_says_with_how_many_threads(capsys):
    main([*TINY, "--methods", "sparsegrad-core,sparsegrad-fixed", "--json", "-"])
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert [row["method"] for row in rows] == ["sparsegrad-core", "sparsegrad-fixed"]
    assert rows[1]["budget"] == 7 * (16 + 24)
    for row in rows:
        assert row["beyond_s"] == row["preparation_s"] - row["passes_s"]
        assert row["threads"] >= 1
    assert err.count("(threads: ") == 2


def test_its_passes_make_the_layers_gradients_and_leave_none(monkeypatch):
    made, backward = [], BlockWorkload.run_backward

    def watched(workload, model, batch):
        backward(workload, model, batch)
        made.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})

    monkeypatch.setattr(BlockWorkload, "run_backward", watched)
    measured(RunSpec(method="sparsegrad-core", budget="2x2", block=(6, 8), batch=2, seq=4, calibration_steps=3))
    weights = {f"blocks.{i}.{kind}.weight" for i in (0, 1) for kind in ("up", "down")}
    assert made == [weights] * (PASSES + 1) + [set()] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "nope", "--json", "-"], "unknown method 'nope'"),
        (["--calibration-steps", "0", "--json", "-"], "must be at least 1"),
        (["--json", f"{__file__}/rows.json"], "cannot be written"),
    ],
)
def test_what_cannot_be_measured_is_said_first(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*TINY, *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
