"""The command line: records on stdout, progress on stderr, one clear line for bad input."""

import json
import subprocess
import sys

import pytest
import torch

from baselines import method
from benchmarks import cli
from benchmarks.harness import models, pairing, turns, worker
from benchmarks.harness.predict import SEMANTICS
from benchmarks.harness.spec import RunSpec
from benchmarks.options import single
from benchmarks.quality import command as quality
from benchmarks.quality.ledger import Heading, Ledger
from benchmarks.quality.schedule import DEFAULT_TIME_LIMIT_S
from benchmarks.quality.study import ARMS, Study
from reports.record import Record, read

LAYER = [
    "run",
    "--layer",
    "12x20",
    "--batch",
    "2",
    "--seq",
    "3",
    "--calibration-steps",
    "2",
    "--rounds",
    "1",
    "--unpaired",
]


def test_run_prints_records_in_the_order_of_methods(capsys):
    assert (
        cli.main([*LAYER, "--methods", "sparsegrad,full,lora[2]", "--equal-trainable", "lora[2]", "--json", "-"]) == 0
    )
    out, err = capsys.readouterr()
    records = json.loads(out)
    assert [r["method"] for r in records] == ["sparsegrad", "full", "lora"]
    assert [r["status"] for r in records] == ["ok"] * 3
    # r (D_in + D_out) entries for LoRA, as many for SparseGrad; full fine-tuning has no budget and is marked so.
    assert [r["budget"] for r in records] == [2 * 32, None, 2]
    assert [r["matched"] for r in records] == [True, False, True]
    assert [r["budget_params"] for r in records] == [64, None, 64]
    assert err.count(" ok, peak ") == 3


def test_run_writes_a_file_and_report_reads_it(tmp_path, capsys):
    path, out = tmp_path / "records.json", tmp_path / "report"
    assert cli.main([*LAYER, "--methods", "full,head", "--json", str(path)]) == 0
    assert [r.method for r in read(path)] == ["full", "head"]
    assert cli.main(["report", str(path), str(path), "--out", str(out)]) == 0
    assert (out / "index.html").is_file()
    assert len((out / "records.csv").read_text().splitlines()) == 1 + 4
    assert capsys.readouterr().out == ""


def test_a_density_an_integer_and_the_default(capsys):
    assert cli.main([*LAYER, "--methods", "random-mask[0.05],random-mask[7],random-mask", "--rounds", "0"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [r["budget"] for r in records] == [0.05, 7, 0.01]
    assert [r["budget_params"] for r in records] == [12, 7, 2]  # of 240 entries
    assert records[0]["step_time_s"] is None


def test_the_reference_of_equal_trainable_may_be_a_default(capsys):
    arguments = [*LAYER, "--rounds", "0", "--methods", "lora,sparsegrad", "--equal-trainable", "lora"]
    assert cli.main(arguments) == 0
    records = json.loads(capsys.readouterr().out)
    # LoRA's default rank 7: 7 (12 + 20) entries.
    assert [(r["budget"], r["matched"], r["budget_params"]) for r in records] == [(7, True, 224), (224, True, 224)]


@pytest.mark.parametrize("path", ["folder", "file/records.json", "/proc/no/records.json", ""])
def test_where_records_cannot_be_written_nothing_is_measured(path, tmp_path, monkeypatch, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(turns, "measure_all", lambda *_: pytest.fail("measured all the same"))
    assert cli.main([*LAYER, "--methods", "full", "--json", path]) == 2
    err = capsys.readouterr().err
    assert f"--json {path} " in err
    assert len(err.splitlines()) == 1


def test_a_closed_standard_output_is_told_before_measuring(monkeypatch, capsys):
    monkeypatch.setattr(turns, "measure_all", lambda *_: pytest.fail("measured all the same"))
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main([*LAYER, "--methods", "full"]) == 2
    assert "standard output is closed" in capsys.readouterr().err


@pytest.fixture
def measured(monkeypatch):
    """The specs that a command line would measure, were there a GPU."""
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(turns, "measure_all", lambda specs, *_: seen.extend(specs))
    return seen


@pytest.mark.parametrize(
    ("methods", "names"),
    [
        ("lora[2]", ["steps.pickle"]),
        (
            "full,lora[2],random-mask[0.05]",
            ["steps-full.pickle", "steps-lora-2.pickle", "steps-random-mask-0.05.pickle"],
        ),
    ],
)
def test_each_method_has_a_snapshot_of_its_own(methods, names, measured, tmp_path, capsys):
    arguments = [*LAYER, "--device", "cuda", "--methods", methods, "--snapshot", str(tmp_path / "steps.pickle")]
    assert cli.main(arguments) == 0
    assert [spec.snapshot for spec in measured] == [str(tmp_path / name) for name in names]


@pytest.mark.parametrize("path", ["missing/steps.pickle", "folder"])
def test_where_a_snapshot_cannot_be_written_nothing_is_measured(path, measured, tmp_path, monkeypatch, capsys):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli.main([*LAYER, "--device", "cuda", "--methods", "full", "--snapshot", path]) == 2
    err = capsys.readouterr().err
    assert f"--snapshot {path} " in err
    assert len(err.splitlines()) == 1
    assert measured == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_snapshot_needs_cuda(measured, tmp_path, capsys):
    arguments = [*LAYER, "--device", "cpu", "--methods", "full", "--snapshot", str(tmp_path / "steps.pickle")]
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert "--snapshot" in err
    assert "needs --device cuda, got cpu" in err
    assert len(err.splitlines()) == 1
    assert measured == []


@pytest.mark.parametrize("to_file", [False, True])
def test_an_interruption_keeps_the_complete_records(to_file, tmp_path, monkeypatch, capsys):
    def interrupted_at_the_head(specs, reference, done, *_):
        done(specs[0], specs[0].blank(specs[0].label(), peak_step_bytes=1), [])
        raise KeyboardInterrupt

    monkeypatch.setattr(turns, "measure_all", interrupted_at_the_head)
    path = tmp_path / "records.json"
    assert cli.main([*LAYER, "--methods", "full,head", "--json", str(path) if to_file else "-"]) == 130
    out, err = capsys.readouterr()
    assert [r["method"] for r in json.loads(path.read_text() if to_file else out)] == ["full"]
    assert "kept" in err


@pytest.mark.parametrize(("options", "paired"), [([], True), (["--unpaired"], False)])
def test_runs_are_paired_with_one_reference_that_ends_with_the_command(options, paired, monkeypatch, capsys):
    seen, closed = [], []
    monkeypatch.setattr(pairing.Reference, "close", lambda self: closed.append(self))
    monkeypatch.setattr(turns, "measure_all", lambda specs, reference, *rest: seen.append((reference, rest)))
    arguments = ["run", "--layer", "12x20", "--methods", "full,head", "--json", "-", "--timing-span", "2.5"]
    assert cli.main([*arguments, "--time-limit", "9", *options]) == 0
    ((reference, (_, time_limit_s, span_s)),) = seen
    assert (time_limit_s, span_s) == (9, 2.5)
    assert (reference is not None) == paired
    assert closed == ([reference] if paired else [])


def test_records_keep_the_order_of_the_methods_whichever_ends_first(monkeypatch, capsys):
    def last_first(specs, reference, done, *_):
        for place in (2, 0, 1, 3):
            record = specs[place].blank("layer", status="oom", reason=str(place))
            done(specs[place], record, [])

    monkeypatch.setattr(turns, "measure_all", last_first)
    assert cli.main(["run", "--layer", "12x20", "--methods", "full,lora[2],head,lora[2]", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert [r["method"] for r in json.loads(out)] == ["full", "lora", "head", "lora"]
    assert [r["reason"] for r in json.loads(out)] == ["0", "1", "2", "3"]
    assert "[4/4] lora[2]: oom: 3" in err


PREDICT = ["predict", *LAYER[1 : LAYER.index("--rounds")]]


def test_predict_prints_records_in_the_order_of_methods(capsys):
    arguments = [*PREDICT, "--methods", "sparsegrad,full,lora[2]", "--equal-trainable", "lora[2]", "--device", "cpu"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    records = json.loads(out)
    assert [r["method"] for r in records] == ["sparsegrad", "full", "lora"]
    assert [(r["status"], r["source"], r["device_semantics"]) for r in records] == [("ok", "predicted", "cpu")] * 3
    assert [(r["budget"], r["matched"]) for r in records] == [(2 * 32, True), (None, False), (2, True)]
    # Weight and bias of 12 x 20 with two moments each, and AdamW's two step counters.
    assert records[1]["resident_bytes"] == 3 * 4 * (12 * 20 + 20) + 2 * 4
    assert err.count(" ok, peak ") == 3


def test_predict_writes_what_report_reads(tmp_path, capsys):
    path = tmp_path / "records.json"
    assert cli.main([*PREDICT, "--methods", "full,head", "--json", str(path)]) == 0
    assert cli.main(["report", str(path), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "index.html").is_file()
    assert capsys.readouterr().out == ""


def test_a_refused_prediction_does_not_end_the_table(capsys, tmp_path):
    path = tmp_path / "config.json"
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    path.write_text(json.dumps({"model_type": "bert", "vocab_size": 99, **sizes}))
    arguments = ["predict", "--model", str(path), "--batch", "1", "--seq", "4", "--methods", "meprop-weight,full"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert [r["status"] for r in json.loads(out)] == ["refused", "ok"]
    assert "1 of 2 runs did not end ok: refused" in err


def test_predict_and_run_share_their_options():
    run, predict = (vars(cli.parser().parse_args([command, "--layer", "2x3"])) for command in ("run", "predict"))
    differing = {"command", "device", "handler", "gpu", "gpu_memory", "max"}
    assert {name: run[name] for name in predict if name not in differing} == {
        name: value for name, value in predict.items() if name not in differing
    }
    assert run.keys() - predict.keys() == {"rounds", "snapshot", "threads", "time_limit", "timing_span", "unpaired"}
    assert predict.keys() - run.keys() == {"gpu", "gpu_memory", "max"}


def test_defaults_and_choices_are_those_of_the_harness():
    run = single(cli.parser().parse_args(["run", "--layer", "2x3"]))
    spec = RunSpec(method="full")
    for name in ("data", "hub", "targets", "train_rest", "adapter_dtype", "batch", "seq", "dtype", "attention"):
        assert getattr(run, name) == getattr(spec, name), name
    for name in ("optimizer", "accumulate", "checkpointing", "lr", "seed", "threads", "calibration_steps", "rounds"):
        assert getattr(run, name) == getattr(spec, name), name
    assert run.timing_span == turns.SPAN_S
    assert run.time_limit == worker.DEFAULT_TIME_LIMIT_S
    assert cli.PREDICTED_DEVICES == SEMANTICS
    assert (cli.OPTIMIZER_IMPLS, cli.ATTENTIONS) == (method.OPTIMIZER_IMPLS, models.ATTENTIONS)
    assert cli.OPTIMIZERS == method.OPTIMIZERS
    known = {"--train-rest": method.TRAIN_REST, "--adapter-dtype": method.ADAPTER_DTYPES}
    for option, words in known.items():
        for word in words:
            cli.parser().parse_args(["run", "--layer", "2x3", option, word])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "12x20", "--methods", "loar"], "unknown method 'loar'; the registry has: full, head, lora"),
        (["--layer", "12x20", "--methods", "sparsegrad[1.5]"], "density must be in (0, 1], got sparsegrad[1.5]"),
        (["--layer", "12x20", "--methods", "sparsegrad[0]"], "must be at least 1"),
        (["--layer", "12x20", "--methods", "sparsegrad[241]"], "must be at most 240 for these layers"),
        (["--layer", "12x20", "--methods", "full[3]"], "full has no budget"),
        (["--layer", "12x20", "--methods", "lora[7"], "cannot read the method"),
        (["--layer", "12x20", "--equal-trainable", "full"], "one method that has a budget"),
        (
            ["--layer", "12x20", "--methods", "sparsegrad", "--equal-trainable", "lora[13]"],
            "must be at most 12 for these layers, got lora[13]",
        ),
        (["--layer", "12x20", "--seed", "99999999999999999999"], "--seed must be from 0 to 4294967295"),
        (["--layer", "12x20", "--batch", "0"], "batch must be at least 1, got 0"),
        (["--layer", "12x20", "--dtype", "int8"], "float64, which AdamW steps, got 'int8'"),
        (["--layer", "12x20", "--attention", "linear"], "--attention must be one of eager, sdpa, sdpa-efficient"),
        (["--layer", "12x20", "--optimizer-impl", "fast"], "--optimizer-impl must be one of for-loop, foreach, fused"),
        (["--layer", "12x20", "--lr", "-1"], "--lr must be positive"),
        (["--layer", "12x20", "--targets", "attention"], "no family is known"),
        (["--model", "minilm-l6", "--targets", "nothing"], "no linear layer of"),
        (["--model", "no-such-model"], "unknown model 'no-such-model'"),
        (["--model", "minilm-l6", "--data", "glue/sst2"], "--hub"),
    ],
)
@pytest.mark.parametrize("command", ["run", "predict"])
def test_bad_input_is_one_clear_line(command, arguments, message, capsys):
    assert cli.main([command, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "--layer", "12"],
        ["run", "--layer", "0x3"],
        ["run", "--layer", "12x20", "--model", "minilm-l6"],
        ["run", "--layer", "12x20", "--train-rest", "some"],
        ["run", "--layer", "12x20", "--batch", "two"],
        ["predict"],
        ["predict", "--layer", "12x20", "--device", "tpu"],
        ["predict", "--layer", "12x20", "--rounds", "3"],
        ["nonsense"],
    ],
)
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arms", "lora,loar"], "unknown arm 'loar': choose of lora, sparsegrad-core@peak"),
        (["--arms", "lora,lora"], "arms must be one or more, each once"),
        (["--tasks", "trec,terc"], "unknown data set 'terc'"),
        (["--tasks", "glue/rte"], "--hub"),
        (["--jobs", "0"], "--jobs must be from 1 to 1024, got 0"),
        (["--minutes", "0"], "--minutes must be positive, got 0"),
        (["--minutes", "nan"], "--minutes must be positive, got nan"),
        (["--time-limit", "-1"], "--time-limit must be positive, got -1"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--arms", "lora,nobody"], "unknown arm 'nobody': choose of lora, "),
        (["--lrs", "0.1,-1"], "learning rates must be positive and finite, got -1"),
        (["--space", "--lrs", "0.1"], "--lrs is of the study, which --space does not run"),
        (["--train-size", "0"], "a training set of 0 cannot be drawn"),
        (["--train-size", "5000"], "trec has a pool of 3981 examples"),
        (["--model", "no-such-model"], "unknown model 'no-such-model'"),
        (["--model", "bert-base"], "bert-base is no encoder with a tokenizer"),
        (["--model", "gpt2"], "gpt2 is no encoder with a tokenizer"),
        (["--json", "/proc/no/summary.json"], "--json /proc/no/summary.json cannot be written"),
    ],
)
def test_a_study_that_cannot_be_is_one_clear_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "records", lambda *_: pytest.fail("predicted all the same"))
    assert cli.main(["quality", "--out", str(tmp_path / "study"), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "study").exists()


def test_another_study_in_the_same_place(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "run_all", lambda *_: pytest.fail("ran all the same"))
    arms = {"head": Record(method="head", model="m")}
    Ledger(tmp_path / "runs.jsonl").start(Heading(Study(seeds=3, arms=("head",)), arms))
    before = (tmp_path / "runs.jsonl").read_bytes()
    assert cli.main(["quality", "--out", str(tmp_path), "--arms", "head", "--seeds", "4", "--epochs", "9"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "is of another study (epochs 8 there, 9 here, seeds 3 there, 4 here): give its settings, or another" in err
    assert len(err.splitlines()) == 1
    assert (tmp_path / "runs.jsonl").read_bytes() == before
    (tmp_path / "runs.jsonl").write_text("nonsense\n")
    assert cli.main(["quality", "--out", str(tmp_path)]) == 2
    assert "runs.jsonl, line 1, is not of a study's runs" in capsys.readouterr().err


def test_the_default_study_is_the_protocols():
    arguments = cli.parser().parse_args(["quality", "--out", "study"])
    assert quality.study_of(arguments) == Study()
    assert arguments.time_limit == DEFAULT_TIME_LIMIT_S
    extended = cli.parser().parse_args(["quality", "--out", "study", "--arms", "extended", "--train-size", "all"])
    assert quality.study_of(extended) == Study(arms=tuple(ARMS), train_size=None)


def test_report_of_what_is_not_a_results_file(tmp_path, capsys):
    for name, text in {"cut.json": '[{"method":', "other.json": '{"a": 1}'}.items():
        (tmp_path / name).write_text(text)
        assert cli.main(["report", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
        assert name in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "absent.json"), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_help_needs_no_torch():
    code = "import sys; from benchmarks import cli; cli.parser().format_help(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_every_command_has_examples(capsys):
    for command in ("run", "predict", "equal-memory", "quality", "report"):
        with pytest.raises(SystemExit) as error:
            cli.main([command, "--help"])
        assert error.value.code == 0
        assert "examples:" in capsys.readouterr().out
