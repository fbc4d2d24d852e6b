"""`compare` on the command line: exit codes, files, and regressions that are planted in real methods."""

import json
from dataclasses import replace

import pytest
import torch

from baselines import registry
from baselines.lora import LoRA
from baselines.method import Method
from baselines.sparsegrad import SparseGrad
from baselines.sparsegrad_compact import CAPACITY, SparseGradCompact
from benchmarks import cli, tracked
from benchmarks.compare_command import CODES
from benchmarks.harness.predict import predict
from benchmarks.harness.spec import RunSpec
from reports import record as record_module
from reports.history import History
from reports.record import Record, read, write
from sparsegrad.adapted import adapted_layers
from sparsegrad.basis import TransitionMatrices
from sparsegrad.support import position_dtype

D_IN, D_OUT, TOKENS = 12, 20, 6
WEIGHTS = 4  # two blocks: up, down, up, down
RECORD = Record(
    method="lora",
    budget=7,
    model="minilm-l6",
    batch=16,
    seq=64,
    torch_version="2.13.0",
    device_name="AMD EPYC",
    peak_step_bytes=1000,
    step_time_ratio=1.0,
    step_time_ratio_low=0.97,
    step_time_ratio_high=1.04,
)
FULL = replace(RECORD, method="full", budget=None)


@pytest.fixture
def files(tmp_path):
    """Writes the two sides and gives their paths."""

    def written(reference, new):
        paths = [tmp_path / "reference.json", tmp_path / "new.json"]
        for path, records in zip(paths, (reference, new), strict=True):
            write(records, path)
        return [str(path) for path in paths]

    return written


# --- regressions planted in real methods


class MomentsKeptDense(SparseGradCompact):
    sparse_optimizer = Method.sparse_optimizer


class Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.clone())
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class SavedActivation(LoRA):
    def prepare(self, model, batches):
        super().prepare(model, batches)
        for _, layer in adapted_layers(model):
            layer.register_forward_hook(lambda module, args, output: Kept.apply(output))


class OneMoreTensorTrains(LoRA):
    def prepare(self, model, batches):
        super().prepare(model, batches)
        _, layer = next(iter(adapted_layers(model)))
        layer.bias.requires_grad_(True)


class BasisHeldTwice(SparseGrad):
    def prepare(self, model, batches):
        super().prepare(model, batches)
        for _, layer in adapted_layers(model):
            layer.basis = TransitionMatrices(layer.basis.U.clone(), layer.basis.V.clone())


FLOAT = 4
SLOTS = CAPACITY * 10
PLANTED = {
    # Two moments of each entry of a weight, where a position and two moments of each slot would do.
    MomentsKeptDense: {
        "optimizer_bytes": WEIGHTS
        * (2 * D_IN * D_OUT * FLOAT - SLOTS * (2 * FLOAT + position_dtype(D_IN * D_OUT).itemsize)),
        "state_params": WEIGHTS * (D_IN * D_OUT - SLOTS),
    },
    # A copy of each layer's output.
    SavedActivation: {"peak_forward_bytes": 2 * TOKENS * (D_IN + D_OUT) * FLOAT},
    # A bias: itself written and given moments, two of each entry and AdamW's counter.
    OneMoreTensorTrains: {
        "trainable_params": D_OUT,
        "updated_params": D_OUT,
        "state_params": D_OUT,
        "resident_bytes": 2 * D_OUT * FLOAT + FLOAT,
    },
    # U and V of both kinds of layer, for both layers of a kind.
    BasisHeldTwice: {
        "basis_bytes": 2 * (D_IN**2 + D_OUT**2) * FLOAT,
        "resident_bytes": 2 * (D_IN**2 + D_OUT**2) * FLOAT,
    },
}


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.__name__)
def test_a_regression_in_a_real_method_is_caught_and_named(planted, files, monkeypatch, tmp_path, capsys):
    spec = RunSpec(
        method=planted.name,
        budget=2 if planted.name == "lora" else 10,
        block=(D_IN, D_OUT),
        batch=2,
        seq=TOKENS // 2,
        calibration_steps=2,
        train_rest="none",
    )
    before = predict(spec)
    known = registry.methods()
    monkeypatch.setattr(registry, "methods", lambda: {**known, planted.name: planted})
    after = predict(spec)
    assert (before.status, after.status) == ("ok", "ok")
    out = tmp_path / "out.json"
    assert cli.main(["compare", *files([before], [after]), "--json", str(out)]) == 1
    found = {move["figure"]: move for move in json.loads(out.read_text())["moves"]}
    for figure, more in PLANTED[planted].items():
        assert (found[figure]["change"], found[figure]["verdict"]) == (more, "regression")
    # Every one of them shows in the figure that decides whether training fits.
    assert found["peak_step_bytes"]["verdict"] == "regression"
    lines = capsys.readouterr().out.splitlines()
    for figure in PLANTED[planted]:
        (line,) = [line for line in lines if line.split()[:2] == ["regression", figure]]
        assert f"{before.label} on block 12x20" in line
    # Without it there is none.
    assert cli.main(["compare", *files([before], [before])]) == 0


def test_a_step_that_takes_thirty_per_cent_longer_is_caught_and_named(files, capsys):
    slower = replace(RECORD, step_time_ratio=1.3, step_time_ratio_low=1.26, step_time_ratio_high=1.35)
    assert cli.main(["compare", *files([RECORD, FULL], [FULL, slower])]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("regression")]
    assert "step_time_ratio" in line
    assert "1.3000 (1.26 to 1.35)" in line
    assert "+30.00" in line
    assert "lora[7] on minilm-l6" in line


# --- exit codes

WORSE = replace(RECORD, peak_step_bytes=1001)
BETTER = replace(RECORD, peak_step_bytes=999)


@pytest.mark.parametrize(
    ("new", "options", "code"),
    [
        ([RECORD, FULL], [], 0),
        ([BETTER, FULL], [], 0),
        ([BETTER, FULL], ["--fail-on", "change"], 1),
        ([RECORD, FULL, replace(RECORD, seed=1)], [], 0),
        ([RECORD, FULL, replace(RECORD, seed=1)], ["--fail-on", "change"], 1),
        ([RECORD, FULL], ["--fail-on", "change"], 0),
        ([WORSE, FULL], [], 1),
        ([replace(RECORD, status="refused", reason="why"), FULL], [], 1),
        ([replace(RECORD, peak_step_bytes=None), FULL], [], 1),
        ([RECORD], [], 3),
        ([], [], 3),
        ([replace(RECORD, torch_version="2.14.0"), FULL], [], 4),
        ([replace(RECORD, torch_version="2.14.0"), FULL], ["--environment", "warn"], 0),
        ([replace(RECORD, device_name="Intel"), FULL], [], 4),
        ([replace(RECORD, device_name="Intel"), FULL], ["--environment", "ignore"], 0),
        ([replace(RECORD, device_semantics="cuda"), FULL], ["--environment", "ignore"], 4),
        # Of several the first of 1, 3, 4; what is not comparable is no regression.
        ([WORSE], [], 1),  # and full fine-tuning is missing
        ([replace(FULL, torch_version="2.14.0")], [], 3),
        ([replace(WORSE, torch_version="2.14.0"), FULL], [], 4),
        ([replace(WORSE, torch_version="2.14.0"), FULL], ["--environment", "warn"], 1),
        ([WORSE, replace(FULL, torch_version="2.14.0")], [], 1),
        ([replace(RECORD, device_name="Intel"), replace(FULL, torch_version="2.14.0")], ["--fail-on", "change"], 4),
    ],
)
def test_exit_codes(new, options, code, files):
    assert cli.main(["compare", *files([RECORD, FULL], new), *options]) == code


def test_all_that_is_wrong_is_printed_whatever_the_code(files, capsys):
    new = [WORSE, replace(FULL, torch_version="2.14.0")]
    assert cli.main(["compare", *files([RECORD, FULL, replace(RECORD, seed=1)], new)]) == 1
    out, err = capsys.readouterr()
    assert [line.split(":")[0].split()[0] for line in out.splitlines() if line][1:] == [
        "regression",
        "missing",
        "environment",
        "2",
    ]
    assert err == "several problems: regression, missing, not comparable; the exit code is the first one's\n"


@pytest.mark.parametrize("whose", [0, 1])
def test_another_version_of_the_schema_is_not_comparable(whose, files, capsys):
    paths = files([RECORD], [RECORD])
    raw = [{**RECORD.to_dict(), "schema_version": 2}]
    with open(paths[whose], "w") as stream:
        json.dump(raw, stream)
    assert cli.main(["compare", *paths]) == CODES["not comparable"] == 4
    err = capsys.readouterr().err
    assert f"{paths[whose]}, record 0: schema_version 2 is not readable here; this suite reads 1" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("reference", "new", "message"),
    [
        ("[", "[]", "cannot be read as JSON"),
        ("[]", "{}", "must hold a JSON list of records or pytest-benchmark's JSON"),
        ('[{"a": 1}]', "[]", "schema_version None is not readable here"),
        ("[]", "[]", "holds no benchmark, so that nothing would be compared"),
        (None, "[]", "cannot read"),
        ("[{0}, {0}]", "[]", "the reference: a benchmark is there twice, leave one out: lora[7] on minilm-l6"),
        ("[{0}]", "[{0}, {0}]", "the new results: a benchmark is there twice"),
    ],
)
def test_unreadable_input_is_one_clear_line(reference, new, message, tmp_path, capsys):
    paths = [tmp_path / "reference.json", tmp_path / "new.json"]
    for path, text in zip(paths, (reference, new), strict=True):
        if text is not None:
            path.write_text(text.replace("{0}", json.dumps(RECORD.to_dict())))
    assert cli.main(["compare", *map(str, paths)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


def test_several_new_files_are_taken_together_and_the_suites_json_is_read(files, tmp_path):
    reference, new = files([RECORD, FULL], [RECORD])
    suite = tmp_path / "suite.json"
    suite.write_text(json.dumps({"benchmarks": [{"extra_info": FULL.to_dict()}, {"extra_info": {"other": 1}}]}))
    assert cli.main(["compare", reference, new]) == 3
    assert cli.main(["compare", reference, new, str(suite)]) == 0
    assert cli.main(["compare", reference, new, str(suite), new]) == 2


def test_thresholds_of_a_users_own(files, tmp_path, capsys):
    paths, own = files([RECORD], [WORSE]), tmp_path / "own.json"
    own.write_text('{"peak_step_bytes": {"rule": "tolerance", "absolute": 1}}')
    assert cli.main(["compare", *paths, "--thresholds", str(own)]) == 0
    own.write_text('{"peak_bytes": {"rule": "exact"}}')
    assert cli.main(["compare", *paths, "--thresholds", str(own)]) == 2
    assert "unknown figure 'peak_bytes'" in capsys.readouterr().err


# --- outputs


def test_every_output_goes_where_it_is_asked_for(files, tmp_path, capsys):
    paths = files([RECORD], [WORSE])
    places = {option: tmp_path / "made" / option for option in ("json", "markdown", "smaller-is-better")}
    arguments = [word for option, path in places.items() for word in (f"--{option}", str(path))]
    assert cli.main(["compare", *paths, *arguments]) == 1
    table = capsys.readouterr().out
    assert "regression  peak_step_bytes" in table
    assert json.loads(places["json"].read_text())["problems"] == ["regression"]
    assert "| regression |" in places["markdown"].read_text()
    assert {entry["value"] for entry in json.loads(places["smaller-is-better"].read_text())} == {1001, 1.0}
    for option in places:
        assert cli.main(["compare", *paths, f"--{option}", "-"]) == 1
        out, err = capsys.readouterr()
        assert (out, err) == (places[option].read_text(), table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json", "-", "--markdown", "-"], "--markdown and --json cannot both go to -"),
        (["--json", "same", "--smaller-is-better", "./same"], "--smaller-is-better and --json cannot both go to"),
        (["--json", "reference.json"], "--json reference.json would overwrite what is compared"),
        (["--markdown", "new.json"], "--markdown new.json would overwrite what is compared"),
        (["--json", "/proc/no/file"], "--json /proc/no/file cannot be written"),
        (["--thresholds", "none.json"], "cannot read the thresholds none.json"),
    ],
)
def test_bad_usage_is_one_clear_line_and_touches_nothing(options, message, files, tmp_path, monkeypatch, capsys):
    files([RECORD], [RECORD])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "reference.json", "new.json", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- update


def test_update_makes_the_new_results_the_reference(files, capsys):
    paths = files([RECORD, FULL], [WORSE, FULL, replace(RECORD, seed=1)])
    assert cli.main(["compare", *paths, "--update"]) == 0
    assert read(paths[0]) == read(paths[1])
    out, err = capsys.readouterr()
    assert "peak_step_bytes" in out  # what is accepted is shown
    assert err.endswith("reference.json now holds the new results: 3 benchmarks\n")
    assert cli.main(["compare", *paths, "--fail-on", "change"]) == 0


def test_update_begins_a_reference_and_leaves_timelines_out(tmp_path):
    categories = {category: [0, 1] for category in record_module.BREAKDOWN}
    timeline = json.dumps({"phases": [["forward", 0]], "at": [0, 1], "by_category": categories})
    reference, new = tmp_path / "reference.json", tmp_path / "new.json"
    write([replace(RECORD, timeline=timeline)], new)
    assert cli.main(["compare", str(reference), str(new), "--update"]) == 0
    assert read(reference) == [RECORD]


@pytest.mark.parametrize(
    ("new", "code"),
    [
        ([RECORD], 3),
        ([], 3),
        ([replace(RECORD, status="crashed", reason="why"), FULL], 1),
        ([replace(RECORD, step_time_ratio=None), FULL], 1),
        ([replace(RECORD, torch_version="2.14.0"), FULL], 4),
        ([replace(RECORD, device_semantics="cuda"), FULL], 4),
    ],
)
def test_update_takes_only_complete_and_comparable_results(new, code, files, tmp_path, capsys):
    paths = files([RECORD, FULL], new)
    before = (tmp_path / "reference.json").read_bytes()
    assert cli.main(["compare", *paths, "--update"]) == code
    assert (tmp_path / "reference.json").read_bytes() == before
    assert "reference.json is as it was" in capsys.readouterr().err


def test_update_takes_another_environment_where_that_is_said(files):
    paths = files([RECORD], [replace(RECORD, torch_version="2.14.0", peak_step_bytes=7)])
    assert cli.main(["compare", *paths, "--update", "--environment", "warn"]) == 0
    assert read(paths[0]) == read(paths[1])


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_update_that_is_interrupted_leaves_the_reference(interruption, files, tmp_path, monkeypatch):
    paths = files([RECORD], [WORSE])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def cut(*_):
        raise interruption

    monkeypatch.setattr(record_module.os, "replace", cut)
    assert cli.main(["compare", *paths, "--update"]) == {KeyboardInterrupt: 130, OSError: 2}[interruption]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reference.json", "reference.json"], "--update would replace reference.json with itself"),
        (["none.json", "empty.json"], "the new results hold no benchmark"),
        (["none.json", "new.json", "new.json"], "a benchmark is there twice"),
    ],
)
def test_what_is_no_update(arguments, message, files, tmp_path, monkeypatch, capsys):
    files([RECORD], [RECORD])
    write([], tmp_path / "empty.json")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", *arguments, "--update"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()


# --- history

WHEN = "2026-01-02T03:04:05+00:00"
COMMITTED = [replace(RECORD, commit="a" * 40, created_at=WHEN), replace(FULL, commit="a" * 40, created_at="then")]


def test_a_line_is_appended_with_each_comparison_and_drawn(files, tmp_path, capsys):
    history, out = tmp_path / "new" / "history.jsonl", tmp_path / "out"
    reference, new = files(COMMITTED, COMMITTED)
    assert cli.main(["compare", reference, new, "--history", str(history)]) == 0
    write([replace(WORSE, commit="b" * 40 + "-dirty"), replace(FULL, commit="b" * 40 + "-dirty")], new)
    # A regression is measured too.
    assert cli.main(["compare", reference, new, "--history", str(history)]) == 1
    assert capsys.readouterr().err.endswith(f"{history} has {'b' * 40}-dirty with 2 benchmarks\n")
    lines = History.read(history).lines
    assert [line.commit for line in lines] == ["a" * 40, "b" * 40 + "-dirty"]
    assert [record.peak_step_bytes for record in lines[1].records] == [1001, 1000]
    # Of results that do not say when, the time at which they were appended.
    assert lines[0].when == WHEN < lines[1].when
    assert "step_time_s" not in lines[0].figures
    assert cli.main(["report", "--history", str(history), "--out", str(out)]) == 0
    assert "bbbbbbb-dirty" in (out / "trend.html").read_text()
    assert 'href="trend.html"' in (out / "index.html").read_text()
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".png") == [
        "history.csv",
        "index.html",
        "moves.csv",
        "records.csv",
        "trend.html",
    ]


def test_a_line_that_was_cut_short_is_replaced_by_the_next(files, tmp_path):
    history = tmp_path / "history.jsonl"
    command = ["compare", *files(COMMITTED, COMMITTED), "--history", str(history)]
    for name in ("one", "two"):
        assert cli.main([*command, "--commit", name]) == 0
    history.write_bytes(history.read_bytes()[:-9])
    assert cli.main([*command, "--commit", "three"]) == 0
    assert [line.commit for line in History.read(history).lines] == ["one", "three"]


def test_an_update_is_appended_only_where_it_is_made(files, tmp_path):
    history = tmp_path / "history.jsonl"
    reference, new = files(COMMITTED, COMMITTED[:1])
    command = ["compare", reference, new, "--update", "--history", str(history)]
    assert cli.main(command) == 3
    assert not history.exists()
    write([replace(record, commit="b", peak_step_bytes=1001) for record in COMMITTED], new)
    assert cli.main(command) == 0
    (tmp_path / "reference.json").unlink()
    assert cli.main([*command, "--commit", "c"]) == 0
    assert [line.commit for line in History.read(history).lines] == ["b", "c"]


@pytest.mark.parametrize(
    ("new", "options", "message"),
    [
        ([RECORD], [], "--history needs results of one commit, and these say none: name it with --commit"),
        ([replace(RECORD, commit="a"), replace(FULL, commit="b")], [], "these say 'a' and 'b'"),
        ([replace(RECORD, commit="a"), FULL], [], "these say 'a'"),
        ([replace(RECORD, commit="<b>\n")], [], "must be a hash or another short name, got '<b>"),
        ([RECORD], ["--commit", "a b"], "must be a hash or another short name, got 'a b'"),
        ([RECORD], ["--commit", ""], "must be a hash or another short name"),
        ([], ["--commit", "a"], "the new results hold no benchmark"),
        ([RECORD], ["--commit", "a", "--json", "history.jsonl"], "cannot both go to history.jsonl"),
        ([RECORD], ["--commit", "a", "--history", "new.json"], "would overwrite what is compared"),
    ],
)
def test_a_history_that_cannot_be_kept_is_one_clear_line(new, options, message, files, tmp_path, monkeypatch, capsys):
    files([RECORD], new)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "reference.json", "new.json", "--history", "history.jsonl", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_commit_without_a_history_and_a_report_of_nothing_are_bad_usage(files, tmp_path, capsys):
    assert cli.main(["compare", *files([RECORD], [RECORD]), "--commit", "a"]) == 2
    assert cli.main(["report", "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "give that too, or leave it out" in err
    assert "give RECORDS.json, --history FILE, or both" in err


# --- what every change is compared with


def test_the_tracked_predictions_are_those_of_the_committed_reference():
    path = record_module.Path(tracked.__file__).with_name("reference") / "records.json"
    reference = read(path)
    conditions = ("method", "budget", "batch", "seq", "dtype", "train_rest", "device_semantics", "optimizer_impl")
    asked = [spec.configuration() | {"workload": spec.label()} for spec in tracked.specs()]
    assert [[each[name] for name in conditions] + [each["workload"]] for each in asked] == [
        [getattr(record, name) for name in conditions] + [record.model] for record in reference
    ]
    assert {record.status for record in reference} == {"ok"}
    assert {record.device_semantics for record in reference} == {"cpu", "cuda"}
    assert cli.main(["compare", str(path), str(path), "--fail-on", "change"]) == 0
