"""The commands that predict: sweeps in a fixed order, the search with --max, and budgets of equal memory."""

import json
import shutil
from dataclasses import replace

import pytest

from benchmarks import cli, predictions
from benchmarks.harness.predict import predict
from benchmarks.harness.spec import RunSpec

BERT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}


@pytest.fixture
def bert(tmp_path):
    """The path of a tiny BERT's config.json, with 40 positions."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "bert", "max_position_embeddings": 40, **BERT}))
    return str(path)


@pytest.fixture
def predicted(monkeypatch):
    """The specs that were predicted, by a stand-in: a token takes 1 MiB, an entry of the budget 1 KiB."""
    specs = []

    def stand_in(spec):
        specs.append(spec)
        size = spec.batch * spec.seq * 2**20 + int((spec.budget or 0) * 2**10)
        room = spec.gpu_memory_bytes
        return spec.blank(
            spec.label(),
            source="predicted",
            peak_step_bytes=size,
            resident_bytes=7,
            fits=None if room is None else size <= room,
            oom_phase=None if room is None or size <= room else "forward",
        )

    monkeypatch.setattr(predictions, "predict", stand_in)
    return specs


def records_of(capsys):
    out, err = capsys.readouterr()
    return json.loads(out), err


# --- the table


def test_the_methods_end_in_a_table_by_their_peaks_and_what_has_none_comes_last(predicted, monkeypatch, capsys):
    stand_in = predictions.predict

    def without(spec):
        return replace(stand_in(spec), status="refused", reason="why", peak_step_bytes=None, resident_bytes=None)

    monkeypatch.setattr(predictions, "predict", lambda spec: (without if spec.method == "head" else stand_in)(spec))
    arguments = ["predict", "--layer", "12x20", "--batch", "2", "--seq", "3"]
    assert cli.main([*arguments, "--methods", "lora[5],head,full,lora[2]"]) == 0
    records, err = records_of(capsys)
    # The records stay in the order of the methods.
    assert [(r["method"], r["budget"]) for r in records] == [("lora", 5), ("head", None), ("full", None), ("lora", 2)]
    heading, *rows = [line.split() for line in err.splitlines()[-5:]]
    assert heading[:2] == ["method", "peak"]
    assert [row[:2] for row in rows] == [["full", "6.00"], ["lora[2]", "6.00"], ["lora[5]", "6.00"], ["head", "—"]]
    assert rows[-1][-2:] == ["refused:", "why"]
    assert cli.main([*arguments, "--methods", "full"]) == 0
    assert "method " not in records_of(capsys)[1]


# --- sweeps


def test_every_combination_in_the_order_of_the_options(predicted, capsys):
    arguments = ["predict", "--layer", "12x20,8x8", "--gpu", "t4,9.0", "--batch", "2,1", "--methods", "lora[2],full"]
    assert cli.main([*arguments, "--seq", "3", "--dtype", "float16", "--optimizer-impl", "fused"]) == 0
    records, err = records_of(capsys)
    assert [(r["model"], r["batch"], r["gpu"], r["method"]) for r in records] == [
        ("layer 12x20", 2, "t4", "lora"),
        ("layer 12x20", 2, "t4", "full"),
        ("layer 12x20", 2, "9.0", "lora"),
        ("layer 12x20", 2, "9.0", "full"),
        ("layer 12x20", 1, "t4", "lora"),
        ("layer 12x20", 1, "t4", "full"),
        ("layer 12x20", 1, "9.0", "lora"),
        ("layer 12x20", 1, "9.0", "full"),
        ("layer 8x8", 2, "t4", "lora"),
        ("layer 8x8", 2, "t4", "full"),
        ("layer 8x8", 2, "9.0", "lora"),
        ("layer 8x8", 2, "9.0", "full"),
        ("layer 8x8", 1, "t4", "lora"),
        ("layer 8x8", 1, "t4", "full"),
        ("layer 8x8", 1, "9.0", "lora"),
        ("layer 8x8", 1, "9.0", "full"),
    ]
    assert {(r["seq"], r["dtype"], r["optimizer_impl"]) for r in records} == {(3, "float16", "fused")}
    assert "[7/16] layer 12x20, batch 1, gpu 9.0, lora[2]: ok" in err


def test_every_swept_option_reaches_the_spec(predicted, bert, capsys):
    other = shutil.copy(bert, bert.replace("config", "other"))
    arguments = ["predict", "--model", f"{bert},{other}", "--seq", "4,2", "--dtype", "bfloat16,float32"]
    arguments += ["--attention", "eager,sdpa", "--optimizer-impl", "foreach,for-loop", "--methods", "lora"]
    assert cli.main(arguments) == 0
    capsys.readouterr()
    seen = [(s.model, s.seq, s.dtype, s.attention, s.optimizer_impl) for s in predicted]
    assert len(seen) == len(set(seen)) == 2**5
    assert seen[0] == (bert, 4, "bfloat16", "eager", "foreach")
    assert seen[1] == (bert, 4, "bfloat16", "eager", "for-loop")
    assert seen[-1] == (other, 2, "float32", "sdpa", "for-loop")


def test_budgets_are_matched_in_each_combination(predicted, capsys):
    arguments = ["predict", "--layer", "12x20,8x8", "--methods", "sparsegrad", "--equal-trainable", "lora[2]"]
    assert cli.main(arguments) == 0
    assert [r["budget"] for r in records_of(capsys)[0]] == [2 * (12 + 20), 2 * (8 + 8)]


def test_a_path_may_have_commas(predicted, bert, tmp_path, capsys):
    path = tmp_path / "one, two.json"
    shutil.copy(bert, path)
    assert cli.main(["predict", "--model", str(path), "--seq", "8", "--methods", "full"]) == 0
    assert [s.model for s in predicted] == [str(path)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "12x20", "--batch", "8,"], "'' is not a whole number"),
        (["--layer", "12x20", "--batch", "8,8.5"], "'8.5' is not a whole number"),
        (["--layer", "12x20,12"], "write a shape as D_INxD_OUT"),
    ],
)
def test_lists_that_cannot_be_read(options, message, predicted, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["predict", *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert predicted == []


LAYER = ["--layer", "16x20"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["predict", "--model", "bert-base,bert-tiny"], "unknown model 'bert-tiny': choose one of minilm-l6"),
        (["predict", *LAYER, "--batch", "8,16,8"], "--batch has 8 twice: give each value once"),
        (["predict", *LAYER, "--batch", "8,08"], "--batch has 8 twice"),
        (["predict", "--layer", "12x20,8x8,12x20"], "--layer has 12x20 twice"),
        (["predict", *LAYER, "--gpu", "t4,T4"], "--gpu has t4 twice"),
        (["predict", "--model", "bert-base,"], "unknown model ''"),
        (["predict", "--model", "bert-base", "--attention", "sdpa,linear"], "--attention must be one of eager, sdpa"),
        (["predict", *LAYER, "--optimizer-impl", "fused,fast"], "must be one of for-loop, foreach, fused, got 'fast'"),
        (["predict", *LAYER, "--batch", "4,0"], "batch must be at least 1, got 0"),
        (["predict", *LAYER, "--seq", "4,0"], "seq must be at least 1, got 0"),
        (["predict", "--model", "bert-base", "--seq", "512,513"], "seq must be at most 512 for bert-base, got 513"),
        (["predict", *LAYER, "--dtype", "float32,float8_e4m3fn"], "which AdamW steps, got 'float8_e4m3fn'"),
        (["predict", *LAYER, "--gpu", "t4,abacus"], "unknown card 'abacus'"),
        (["predict", *LAYER, "--gpu", "t4,6.1"], "before compute capability 7.0"),
        (["predict", "--layer", "64x64,16x20", "--methods", "lora[17]"], "must be at most 16 for these layers"),
        (["predict", *LAYER, "--device", "cpu", "--gpu", "t4"], "not with --device cpu"),
        (["predict", *LAYER, "--device", "cpu", "--gpu-memory", "1GiB"], "not with --device cpu"),
        (["predict", "--model", "bert-base", "--device", "cpu", "--attention", "sdpa,sdpa-flash"], "kernel of CUDA's"),
        (["predict", *LAYER, "--attention", "eager,sdpa"], "a layer or block has no attention"),
        (["predict", *LAYER, "--max", "batch"], "give --gpu-memory, such as 24GiB"),
        (["predict", *LAYER, "--max", "seq", "--gpu-memory", "1GiB", "--device", "cpu"], "not with --device cpu"),
        (["predict", *LAYER, "--max", "seq", "--gpu-memory", "1GiB", "--seq", "1,2"], "one value of --seq"),
        (["run", *LAYER, "--batch", "8,16"], "run takes one value of --batch, got 8,16; predict takes several"),
        (["run", "--layer", "12x20,8x8"], "run takes one value of --layer, got 12x20,8x8"),
        (["equal-memory", *LAYER, "--reference", "lora", "--gpu", "t4,l4"], "equal-memory takes one value of --gpu"),
        (["equal-memory", *LAYER, "--reference", "lora,full"], "--reference takes one method, got 'lora,full'"),
        (["equal-memory", *LAYER, "--reference", "all"], "--reference takes one method, got 'all'"),
        (["equal-memory", *LAYER, "--reference", "lora[17]"], "must be at most 16 for these layers"),
        (["equal-memory", *LAYER, "--reference", "loar"], "unknown method 'loar'"),
        (["equal-memory", *LAYER, "--reference", "lora", "--methods", "random-mask[400]"], "must be at most 320"),
        (["equal-memory", *LAYER, "--reference", "lora", "--metric", "batch"], "--metric must be one of peak_step_by"),
        (["equal-memory", *LAYER, "--reference", "lora", "--metric", "nvml_process_bytes"], "peak_reserved_bytes, got"),
        (
            ["equal-memory", *LAYER, "--reference", "lora", "--metric", "peak_reserved_bytes", "--device", "cpu"],
            "temporary_bytes, got 'peak_reserved_bytes'",
        ),
    ],
)
def test_bad_input_is_one_clear_line_before_the_first_prediction(command, message, predicted, capsys):
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    assert (out, predicted) == ("", [])
    assert message in err
    assert len(err.strip().splitlines()) == 1


# --- the largest that fits


@pytest.mark.parametrize(("what", "given"), [("batch", "seq"), ("seq", "batch")])
def test_the_largest_that_fits_for_each_method(what, given, predicted, capsys):
    arguments = ["predict", *LAYER, f"--{what}", "16", f"--{given}", "8", "--gpu-memory", "1GiB", "--max", what]
    assert cli.main([*arguments, "--methods", "full,random-mask[200]"]) == 0
    records, err = records_of(capsys)
    # 8 MiB for each more of the 1024 there are; the budget's 200 KiB leave no room for the last.
    assert [(r["method"], r[what], r[given], r["fits"]) for r in records] == [
        ("full", 128, 8, True),
        ("random-mask", 127, 8, True),
    ]
    assert f"[1/2] full: largest {what} 128: ok, peak 1024.0 MiB, fits in 1 GiB" in err
    assert f"  full, {what} 129: ok, peak 1032.0 MiB, does NOT fit" in err


def test_where_not_even_one_fits(predicted, capsys):
    assert cli.main(["predict", *LAYER, "--gpu-memory", "100MiB", "--max", "batch", "--methods", "full"]) == 0
    ((record,), err) = records_of(capsys)
    assert (record["batch"], record["fits"], record["oom_phase"]) == (1, False, "forward")
    assert "[1/1] full: largest batch none, not even 1: ok, peak 128.0 MiB, does NOT fit" in err


def test_a_model_ends_the_search_for_its_longest_sequence(predicted, bert, capsys):
    arguments = ["predict", "--model", bert, "--batch", "1", "--seq", "16", "--gpu-memory", "80GiB", "--max", "seq"]
    assert cli.main([*arguments, "--methods", "full"]) == 0
    ((record,), _) = records_of(capsys)
    assert record["seq"] == 40
    assert [spec.seq for spec in predicted] == [16, 32, 40]


def test_max_goes_with_sweeps(predicted, capsys):
    arguments = ["predict", *LAYER, "--seq", "8,16", "--gpu-memory", "1GiB", "--max", "batch", "--methods", "full"]
    assert cli.main(arguments) == 0
    assert [(r["seq"], r["batch"]) for r in records_of(capsys)[0]] == [(8, 128), (16, 64)]


# --- equal memory

EQUAL = ["equal-memory", *LAYER, "--batch", "1", "--seq", "1"]


def test_equal_memory_gives_the_largest_budgets(predicted, capsys):
    methods = "full,random-mask,meprop-weight[0.1],lora,sparsegrad"
    assert cli.main([*EQUAL, "--reference", "lora[7]", "--methods", methods]) == 0
    records, err = records_of(capsys)
    # A budget of 7 has the reference's memory, whatever the method; the reference comes first.
    assert [(r["method"], r["budget"], r["matched"]) for r in records] == [
        ("lora", 7, True),
        ("full", None, False),
        ("random-mask", 7, True),
        ("meprop-weight", 0.1, False),
        ("sparsegrad", 7, True),
    ]
    assert {r["equal_memory"] for r in records} == {"lora[7] peak_step_bytes"}
    assert sum(spec.method == "lora" for spec in predicted) == 1
    table = err[err.index("\nmethod ") :].split("\n")
    assert [line.split()[0] for line in table if line] == ["method", *(r["method"] for r in records)]
    assert "unmatched: no budget to match" in err
    assert "unmatched: a budget of its own" in err


def test_the_reference_need_not_be_among_the_methods(predicted, capsys):
    assert cli.main([*EQUAL, "--reference", "random-mask[9]", "--methods", "sparsegrad"]) == 0
    records, err = records_of(capsys)
    assert [(r["method"], r["budget"]) for r in records] == [("sparsegrad", 9)]
    assert "the reference" in err


def test_a_metric_that_does_not_depend_on_the_budget(predicted, capsys):
    arguments = [*EQUAL, "--reference", "lora", "--methods", "sparsegrad", "--metric", "resident_bytes"]
    assert cli.main(arguments) == 0
    ((record,), _) = records_of(capsys)
    assert (record["budget"], record["equal_memory"]) == (16 * 20, "lora[7] resident_bytes")
    assert len(predicted) == 2


def test_where_no_budget_fits_the_record_says_so(predicted, capsys):
    assert cli.main([*EQUAL, "--reference", "full", "--methods", "sparsegrad,full"]) == 0
    records, err = records_of(capsys)
    assert [(r["method"], r["budget"], r["matched"]) for r in records] == [
        ("full", None, True),
        ("sparsegrad", 1, False),
    ]
    assert records[1]["reason"] == "no budget fits: even sparsegrad[1] has 1,049,600 bytes, more than 1,048,576"
    assert "unmatched: no budget fits" in err


def test_a_reference_that_is_refused_matches_nothing(monkeypatch, capsys):
    monkeypatch.setattr(predictions, "predict", lambda spec: spec.blank("m", status="refused", reason="who knows"))
    assert cli.main([*EQUAL, "--reference", "lora[7]", "--methods", "sparsegrad"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "nothing can be matched to lora[7]: refused, who knows" in err


def test_equal_memory_of_a_layer(capsys):
    arguments = ["equal-memory", "--layer", "64x96", "--batch", "2", "--seq", "8", "--device", "cpu"]
    assert (
        cli.main([*arguments, "--reference", "random-mask[1500]", "--methods", "lora", "--metric", "resident_bytes"])
        == 0
    )
    ((record,), _) = records_of(capsys)
    spec = RunSpec("random-mask", budget=1500, layer=(64, 96), batch=2, seq=8, device="cpu")
    rank = record["budget"]
    limit, beyond = (
        predict(replace(spec, method=method, budget=budget)).resident_bytes
        for method, budget in (("random-mask", 1500), ("lora", rank + 1))
    )
    assert record["resident_bytes"] <= limit < beyond
