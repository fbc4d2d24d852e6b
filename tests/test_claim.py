"""The claim: the rules of its verdicts, the arithmetic of the paper's tables, searches, and the command."""

import csv
import json
import re
from contextlib import suppress
from dataclasses import replace
from functools import partial
from html import unescape

import pytest

from benchmarks import cli
from benchmarks.claim import command, equal_parameters, equal_peak, fixed_card, paper, predictor, quality, sensitivity
from benchmarks.claim.cases import CASES, LLAMA, PUBLISHED, ROBERTA_BASE, Case
from benchmarks.claim.equal_parameters import AS_PRINTED, DEFINITIONS, MATCHED, Found
from benchmarks.claim.predictor import Predictor, made_before
from benchmarks.claim.verdict import FAILS, HOLDS, UNDECIDED, combine, judge
from benchmarks.harness.errors import InputError
from benchmarks.harness.spec import RunSpec
from reports.capacity import CONTEXT_BYTES
from reports.record import Record, read, write

GIB = 2**30
SIZES = {name: 1000 for name in DEFINITIONS}
LORA = Record(method="lora", budget=7, model="m", budget_params=100, device_semantics="cuda", **SIZES)
MEPROP = replace(LORA, method="meprop-weight")
SPARSEGRAD = replace(LORA, method="sparsegrad")
NO_STUDY = quality.judge(None)


# --- verdicts


@pytest.mark.parametrize(
    ("figure", "tolerance", "verdict", "direction"),
    [
        (1.0, 0.02, HOLDS, "equal"),
        (1.02, 0.02, HOLDS, "equal"),
        (1.03, 0.02, FAILS, "above"),
        (1.03, 0.05, HOLDS, "equal"),
        (0.97, 0.02, FAILS, "below"),
        (0.98, 0.02, HOLDS, "equal"),
        (1016 / 944, 0.05, FAILS, "above"),
        (1016 / 944, 0.08, HOLDS, "equal"),
    ],
)
def test_identical_has_two_sides(figure, tolerance, verdict, direction):
    found = judge(figure, tolerance)
    assert (found.verdict, found.direction) == (verdict, direction)


@pytest.mark.parametrize(
    ("interval", "verdict", "direction"),
    [
        ((0.99, 1.01), HOLDS, "equal"),
        ((0.99, 1.03), UNDECIDED, None),
        ((0.9, 1.1), UNDECIDED, None),
        ((0.9, 0.97), FAILS, "below"),
        ((1.021, 1.2), FAILS, "above"),
    ],
)
def test_an_interval_that_spans_a_limit_decides_nothing(interval, verdict, direction):
    found = judge(sum(interval) / 2, 0.02, interval)
    assert (found.verdict, found.direction) == (verdict, direction)


def test_a_missing_figure_is_undecided_and_says_so():
    assert judge(None, 0.02).reason == "not obtained"
    assert judge(None, 0.02).verdict == UNDECIDED
    with pytest.raises(ValueError, match="finite"):
        judge(float("nan"), 0.02)


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([HOLDS, HOLDS], HOLDS),
        ([HOLDS, UNDECIDED], UNDECIDED),
        ([HOLDS, UNDECIDED, FAILS], FAILS),
        ([], UNDECIDED),  # nothing was seen to hold
    ],
)
def test_cases_together(verdicts, expected):
    assert combine(verdicts) == expected


# --- the paper's tables


def test_table_3_and_8_agree_and_have_the_ratios_that_are_quoted():
    assert {name: round(value, 3) for name, value in paper.ratios().items()} == {
        "lora/full": 0.702,
        "sparsegrad/full": 0.755,
        "sparsegrad/lora": 1.076,
    }
    for row in paper.table("table8"):
        printed = next(float(r["memory_mb"]) for r in paper.table("table3") if r["method"] == row["method"])
        assert float(row["avg"]) == printed


def test_means_by_batch_are_over_the_tasks_of_that_batch():
    # RoBERTa-base, Tables 13-15: MNLI, MRPC and RTE at 32, the other five at 16.
    found = paper.by_batch()
    assert found[32]["full"] == pytest.approx((1350 + 1362 + 1314) / 3)
    assert found[16]["lora"] == pytest.approx((969 + 978 + 938 + 935 + 855) / 5)


def test_counts_of_bytes_from_counts_of_parameters():
    # 100 parameters, of which a target weight has 60; LoRA adds 10, SparseGrad keeps 6, its bases are 5 floats.
    full = Record(method="full", model="m", total_params=100)
    lora = Record(method="lora", model="m", budget_params=10, trainable_params=50)
    sparsegrad = Record(method="sparsegrad", model="m", budget_params=6, basis_bytes=20)
    counted = paper.counted(full, lora, sparsegrad)
    assert [size for _, size in paper.floors(full)] == [400, 1200, 1600]
    # weights 4 B each; moments 8 B for each that trains
    assert counted["dense moments"] == {"full": 1200, "lora": 440 + 400, "sparsegrad": 400 + 20 + 800}
    assert counted["moments of the kept entries"]["sparsegrad"] == 400 + 20 + 8 * (40 + 6)


def test_agreement_with_the_paper_needs_every_ratio():
    printed = paper.ratios()
    assert paper.reproduced(printed) is True
    assert paper.reproduced({**printed, "lora/full": printed["lora/full"] * 1.021}) is False
    assert paper.reproduced({**printed, "lora/full": None}) is None


def test_what_is_said_of_llama_is_what_its_shapes_say():
    # 11 of 32 blocks, each with three weights of 4096 x 11008.
    targets, model = 33 * 4096 * 11008, 6_738_415_616
    assert round(100 * targets / model) == 22
    assert round(100 * 33 * LLAMA.rank * (4096 + 11008) / model, 2) == 0.24
    assert round(100 * 33 * LLAMA.kept / model, 2) == 0.05
    spec = RunSpec(method="full", **LLAMA.common())
    workload = spec.workload()
    layers = workload.layers(workload.skeleton())
    assert {kind: len(names) for kind, names in layers.items()} == {"gate": 11, "up": 11, "down": 11}
    assert layers["up"][1].endswith("layers.3.mlp.up_proj")


# --- the readings


def found_of(sparsegrad):
    pairs = ((MATCHED, LORA), (MATCHED, MEPROP), (MATCHED, sparsegrad), (AS_PRINTED, sparsegrad))
    return [Found(ROBERTA_BASE, budgets, record) for budgets, record in pairs]


def verdict_of(rows, **wanted):
    (row,) = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return row


def test_reading_1_judges_each_definition_at_each_tolerance_against_both_rivals():
    rows = list(equal_parameters.verdicts(found_of(replace(SPARSEGRAD, peak_step_bytes=1040, resident_bytes=900))))
    assert len(rows) == len(DEFINITIONS) * 3 * 3  # LoRA and MeProp at equal budgets, LoRA at the paper's
    step = {"definition": "peak_step_bytes", "budgets": MATCHED, "against": "lora[7]"}
    assert [verdict_of(rows, tolerance=t, **step)["verdict"] for t in (0.02, 0.05, 0.08)] == [FAILS, HOLDS, HOLDS]
    below = verdict_of(rows, tolerance=0.08, **{**step, "definition": "resident_bytes"})
    assert (below["verdict"], below["direction"], below["figure"]) == (FAILS, "below", 0.9)
    assert below["evidence"] == "900 / 1000 bytes"


def test_reading_1_has_no_verdict_on_what_was_not_obtained():
    blank = dict.fromkeys(DEFINITIONS)
    refused = replace(SPARSEGRAD, status="refused", reason="why", **blank)
    rows = list(equal_parameters.verdicts(found_of(refused)))
    assert {row["verdict"] for row in rows} == {UNDECIDED}
    assert rows[0]["reason"] == "not obtained (sparsegrad[7]: refused, why)"


def test_reading_2_fails_where_no_budget_fits_and_is_the_studys_where_one_does():
    small = replace(SPARSEGRAD, budget=1, matched=False, peak_step_bytes=1100, reason="no budget fits")
    row = equal_peak.verdict(ROBERTA_BASE, [LORA, small], quality.judge(study(HOLDS)))
    assert (row["verdict"], row["direction"], row["figure"]) == (FAILS, "above", 1.1)
    fits = replace(SPARSEGRAD, budget=3, matched=True, budget_params=50)
    assert equal_peak.verdict(ROBERTA_BASE, [LORA, fits], NO_STUDY)["verdict"] == UNDECIDED
    studied = quality.judge(study(HOLDS))
    assert equal_peak.verdict(ROBERTA_BASE, [LORA, fits], studied)["verdict"] == HOLDS
    assert equal_peak.verdict(ROBERTA_BASE, [LORA], studied)["verdict"] == UNDECIDED
    # Within the tolerance the least budget has LoRA's peak, too.
    near = replace(small, peak_step_bytes=1010)
    assert equal_peak.verdict(ROBERTA_BASE, [LORA, near], studied)["verdict"] == HOLDS


def test_reading_2_is_not_decided_by_a_study_in_which_the_published_method_had_more_memory():
    fits = replace(SPARSEGRAD, budget=3, matched=True, budget_params=50)
    studied = quality.judge(study(HOLDS, peak=1280))
    assert (studied.verdict, studied.peak_ratio) == (HOLDS, 1.28)
    row = equal_peak.verdict(ROBERTA_BASE, [LORA, fits], studied)
    assert row["verdict"] == UNDECIDED
    assert row["reason"].startswith("its quality was not studied at lora's peak: ")
    assert "at 1.28 of lora's peak" in row["reason"]


def study(verdict, peak=1000, **published):
    """A summary as the study writes it: its primary endpoint undecided, the published method against LoRA as given.

    `peak` is the published method's peak of a step where LoRA's is 1000.
    """
    undone = {"first": "sparsegrad-core@peak", "second": "lora", "verdict": UNDECIDED, "reason": "2 of 9 are not done"}
    done = {"first": PUBLISHED, "second": "lora", "verdict": verdict, "difference": 1.5, "low": 0.5, "high": 2.5}
    settings = ("model", "train_size", "epochs", "batch", "longest", "train_rest", "seeds")
    return {
        "protocol": 2,
        "study": dict.fromkeys(settings, 1),
        "runs": {"settled": 1, "planned": 2, "failed": [], "hours": 0.5},
        "arms": [
            studied_arm("lora"),
            studied_arm("sparsegrad-core@peak"),
            studied_arm("full", 1500),
            studied_arm(PUBLISHED, peak),
        ],
        "primary": undone,
        "secondary": [{**undone, "first": "full"}, {**done, **published}],
    }


def studied_arm(name, peak=1000):
    of = {"arm": name, "method": name, "label": name, "matched": "none", "trainable_params": 9, "tasks": []}
    return {**of, "peak_step_bytes": peak, "mean": None}


def test_quality_that_was_not_studied_never_passes():
    assert (NO_STUDY.verdict, NO_STUDY.studied) == (UNDECIDED, False)


def test_the_studys_verdict_is_the_published_methods_and_its_primary_endpoint_is_said():
    found = quality.judge(study(FAILS))
    assert (found.verdict, found.studied) == (FAILS, True)
    assert [case["case"] for case in found.cases] == [
        "sparsegrad-core@peak minus lora",
        "full minus lora",
        "sparsegrad minus lora",
    ]
    assert found.sentence == (
        "sparsegrad-core@peak minus lora: undecided, 2 of 9 are not done; "
        "sparsegrad minus lora: fails, +1.50 points (+0.50 to +2.50) at 1.00 of lora's peak"
    )
    # An interval without zero in it that decides nothing says why.
    waiting = quality.judge(study(UNDECIDED, reason="the correction waits"))
    assert waiting.sentence.endswith(
        "undecided, +1.50 points (+0.50 to +2.50) at 1.00 of lora's peak: the correction waits"
    )
    assert quality.judge({**study(FAILS), "primary": None, "secondary": []}).verdict == UNDECIDED


@pytest.mark.parametrize(
    ("differences", "without"),
    [
        ([1.0, 25.0, -0.5, -0.5], {"task": "b", "figure": 0.0}),
        ([3.0, 3.0, 2.0, -20.0], {"task": "d", "figure": 8 / 3}),
        ([1.0], None),
        ([], None),
    ],
)
def test_a_mean_that_hangs_on_one_task_says_what_the_others_have(differences, without):
    tasks = "abcd"[: len(differences)]
    rows = [{"task": t, "difference": d, "low": d - 1, "high": d + 1} for t, d in zip(tasks, differences, strict=True)]
    found = quality.judge(study(HOLDS, per_task=rows))
    assert found.cases[-1]["without"] == (without and {**without, "figure": pytest.approx(without["figure"])})
    assert (
        (f"peak, {without['figure']:+.2f} without {without['task']}" in found.sentence)
        if without
        else found.sentence.endswith("peak")
    )


@pytest.mark.parametrize(
    "summary",
    [
        {},
        {"primary": {}, "secondary": []},
        study("splendid"),
        [1],
        study(HOLDS, difference="<b>"),
        study(HOLDS, low=1e999),
        study(HOLDS, peak=0),
        {**study(HOLDS), "arms": []},
        {**study(HOLDS), "explored": [{**study(HOLDS)["secondary"][0], "verdict": HOLDS}]},
    ],
)
def test_what_is_no_studys_summary_is_refused(summary):
    with pytest.raises(InputError, match=r"lacks what|one of (holds|None)"):
        quality.judge(summary)


@pytest.mark.parametrize("bend", [0, 7])
@pytest.mark.parametrize("slope", [1, 37])
def test_the_largest_batch_fits_and_one_half_a_per_cent_above_it_does_not(slope, bend):
    """Memory of a batch: 100 MiB and `slope` MiB for each example, and `bend` MiB more at every other one."""
    asked = []

    def predict(spec):
        asked.append(spec)
        size = (100 + slope * spec.batch + bend * (spec.batch % 2)) * 2**20
        room = spec.gpu_memory_bytes
        return spec.blank(
            "m",
            device_semantics="cuda",
            peak_step_bytes=size,
            peak_reserved_bytes=size + 2**20,
            peak_preparation_bytes=0,
            fits=None if room is None else size <= room - CONTEXT_BYTES,
        )

    spec = RunSpec(method="lora", budget=7, model="minilm-l6", device="cuda", batch=32)
    search = fixed_card.Search(spec, "batch", Predictor(predict))
    for card in (16 * GIB, 24 * GIB):
        largest = search.largest("case", card)
        sizes = [100 + slope * n + bend * (n % 2) for n in (largest.number, largest.most + 1)]
        assert sizes[0] <= card // 2**20 - 512 < sizes[1]
        assert largest.most - largest.number <= largest.number / 200
    assert len(asked) <= 12


def test_nothing_fits_is_nought_and_a_failure_is_missing():
    spec = RunSpec(method="lora", budget=7, model="minilm-l6", device="cuda", batch=32)
    needs = {"peak_step_bytes": 99 * GIB, "peak_reserved_bytes": 99 * GIB, "peak_preparation_bytes": 0}
    large = fixed_card.Search(spec, "batch", Predictor(lambda s: s.blank("m", **needs))).largest("c", 16 * GIB)
    assert (large.number, large.reason) == (0, None)
    refused = Predictor(lambda s: s.blank("m", status="refused", reason="why"))
    failed = fixed_card.Search(spec, "batch", refused).largest("c", 16 * GIB)
    assert (failed.number, failed.reason) == (None, "batch 32: refused, why")
    sparsegrad = replace(failed, record=SPARSEGRAD)
    five = replace(large, number=5, most=5)
    rows = list(fixed_card.verdicts([five, sparsegrad]))
    assert {(row["verdict"], row["reason"]) for row in rows} == {(UNDECIDED, "batch 32: refused, why")}
    fewer = list(fixed_card.verdicts([five, replace(sparsegrad, number=4, most=4, reason=None)]))
    assert {(row["verdict"], row["direction"]) for row in fewer} == {(FAILS, "below")}
    # 1000 to 1005 against 1010 to 1015 may be 0.985 or 0.995 of it: identical either way; 0.979 to 0.984 may not.
    many = replace(five, number=1010, most=1015)
    near, apart = (
        [
            row["verdict"]
            for row in fixed_card.verdicts([many, replace(sparsegrad, number=n, most=n + 5, reason=None)])
            if row["tolerance"] == 0.02
        ]
        for n in (1000, 990)
    )
    assert (near, apart) == ([HOLDS], [UNDECIDED])


def test_a_card_that_failed_leaves_the_search_of_the_next(tiny_need):
    spec = RunSpec(method="lora", budget=7, model="minilm-l6", device="cuda", batch=32)

    def predict(spec):
        if spec.gpu_memory_bytes == 16 * GIB:
            return spec.blank("m", status="crashed", reason="why")
        return tiny_need(spec, 100 * spec.batch)

    search = fixed_card.Search(spec, "batch", Predictor(predict))
    found = [search.largest("c", card * GIB) for card in (16, 24, 16)]
    assert [each.number for each in found] == [None, (24 * 1024 - 512) // 100, None]
    assert all(found[i].reason.endswith("crashed, why") for i in (0, 2))


def test_no_sequence_below_the_least_is_asked_for_and_none_fits_where_that_does_not(tiny_need):
    spec = RunSpec(method="lora", budget=7, model="minilm-l6", device="cuda", batch=32, seq=128)
    asked = []

    def predict(spec):
        asked.append(spec.seq)
        return tiny_need(spec, 99 * 1024 + spec.seq)

    largest = fixed_card.Search(spec, "seq", Predictor(predict)).largest("c", 16 * GIB)
    assert (largest.number, largest.most, largest.reason) == (0, 0, None)
    assert min(asked) == largest.record.seq == fixed_card.LEAST["seq"]


def test_a_peak_that_hardly_rises_is_followed_in_bounded_steps(tiny_need):
    """Up to 60 examples the peak lies in the optimizer's step; beyond, at 200 MiB an example."""
    spec = RunSpec(method="lora", budget=7, model="minilm-l6", device="cuda", batch=8)
    asked = []

    def predict(spec):
        asked.append(spec.batch)
        return tiny_need(spec, max(12000, 200 * spec.batch) + spec.batch / 1024)

    largest = fixed_card.Search(spec, "batch", Predictor(predict)).largest("c", 16 * GIB)
    assert largest.number == (16 * 1024 - 512) // 200
    assert all(n <= fixed_card.FURTHEST * max(asked[:i]) for i, n in enumerate(asked) if i)


@pytest.fixture
def tiny_need():
    """A function of a spec and its peak in MiB, of a step and of reserved memory, to a prediction."""

    def predicted(spec, mib):
        size = int(mib * 2**20)
        room = spec.gpu_memory_bytes
        return spec.blank(
            "m",
            device_semantics="cuda",
            peak_step_bytes=size,
            peak_reserved_bytes=size,
            peak_preparation_bytes=0,
            fits=None if room is None else size <= room - CONTEXT_BYTES,
        )

    return predicted


def test_turns_count_the_conditions_that_need_less():
    base = {"method": "m", "batch": 1, "seq": 2, "dtype": "float32", "changed": None}
    rows = [{**base, "batch": batch, "to_lora": ratio} for batch, ratio in ((1, 1.5), (2, 0.9), (3, 1.0), (4, None))]
    (found,) = sensitivity.turns(rows)
    assert (found["conditions"], found["below"]) == (3, 1)
    assert (found["least"], found["least_at"], found["most_at"]) == (0.9, "2 x 2, float32", "1 x 2, float32")


# --- the command

CONFIG = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SHAPE = {"num_attention_heads": 2, "vocab_size": 99, "max_position_embeddings": 40}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The quick selection on a tiny BERT, without dropout's refusals and on one card; and no study of quality."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG, **SHAPE, "hidden_dropout_prob": 0.0}))
    workload = {"batch": 4, "seq": 8, "dtype": "float32", "train_rest": "all", "targets": "mlp"}
    case = Case("tiny", {"model": str(path), **workload}, rank=2, kept=20, seq_batch=4, note="small")
    scope = replace(
        command.QUICK,
        cases=(case,),
        methods=("lora", "meprop-weight", PUBLISHED),
        on_cards=("lora", PUBLISHED),
        axes=("seq",),
    )
    monkeypatch.setattr(command, "QUICK", scope)
    monkeypatch.setattr(command, "SUMMARY", tmp_path / "none.json")
    return tmp_path / "out"


def test_the_quick_claim_on_a_tiny_model(tiny, capsys):
    assert cli.main(["claim", "--quick", "--out", str(tiny), "--jobs", "1"]) == 0
    found = json.loads((tiny / "claim.json").read_text())
    assert found["schema_version"] == 1
    assert found["quality"]["studied"] is False
    assert found["verdict"] == combine(reading["verdict"] for reading in found["readings"])
    rows = [row for row in found["verdicts"] if row["reading"] == 1 and row["definition"] == "peak_step_bytes"]
    records = {record.label: record for record in read(tiny / "records.json") if record.seq == 8}
    assert {row["against"] for row in rows} == {"lora[2]", "meprop-weight[96]"}  # 2 x (16 + 32) entries
    for row in rows:
        expected = records[row["label"]].peak_step_bytes / records[row["against"]].peak_step_bytes
        assert row["figure"] == expected
    with (tiny / "verdicts.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == len(found["verdicts"])
    # A tiny model's longest sequence fits on any card.
    assert {row["number"] for row in found["cards"]} == {40}
    assert all(row["longest"] for row in found["cards"])
    assert "not studied yet" in (tiny / "index.html").read_text()
    page = (tiny / "index.html").read_text()
    assert all(finding in unescape(page) for finding in found["space"]["findings"])
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for name in ("space-energy.csv", "space-zero-rows.csv"):
        assert f'href="{name}"' in page
        assert (tiny / name).exists()
    err = capsys.readouterr().err
    assert f"the claim {found['verdict']}" in err
    assert "reading 3, Fixed card: holds" in err


@pytest.mark.parametrize(
    ("verdict", "require", "code"),
    [(FAILS, None, 0), (UNDECIDED, "holds", 1), (FAILS, "holds", 1), (HOLDS, "holds", 0)],
)
def test_exit_codes(tmp_path, monkeypatch, verdict, require, code):
    names = ("verdicts", "memory", "budgets", "cards", "sensitivity", "readings")
    found = {"verdict": verdict, "sentence": "s", "quality": {"arms": []}, **{name: [] for name in names}}
    monkeypatch.setattr(command, "gather", lambda *_: dict(found))
    monkeypatch.setattr(command, "write_page", lambda *_: tmp_path / "index.html")
    arguments = ["claim", "--out", str(tmp_path), *(["--require", require] if require else [])]
    assert cli.main(arguments) == code


def test_a_study_of_ones_own_enters_the_claim(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(command, "gather", lambda scope, predictor, found: asked.append(found) or 1 / 0)
    (tmp_path / "mine.json").write_text(json.dumps(study(HOLDS)))
    with pytest.raises(ZeroDivisionError):
        cli.main(["claim", "--quick", "--out", str(tmp_path / "out"), "--quality", str(tmp_path / "mine.json")])
    assert asked == [study(HOLDS)]
    for name, content in (("absent.json", None), ("broken.json", "{"), ("other.json", "[1]")):
        if content is not None:
            (tmp_path / name).write_text(content)
        assert cli.main(["claim", "--out", str(tmp_path / "out"), "--quality", str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.startswith("sparsegrad-bench: ")
    assert len(asked) == 1


def test_every_final_run_is_a_row():
    tasks = [{"task": "trec", "metric": "accuracy", "lr": 0.1, "scores": {0: 1.5, 3: 2.5}}]
    rows = list(quality.scores([{"arm": "a", "label": "a[1]", "peak_step_bytes": 9, "tasks": tasks}]))
    assert [(row["arm"], row["task"], row["seed"], row["score"]) for row in rows] == [
        ("a", "trec", 0, 1.5),
        ("a", "trec", 3, 2.5),
    ]


def test_a_directory_that_cannot_be_written_is_said_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["claim", "--quick", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_prediction_is_made_once_and_keeps_why_its_budget_was_chosen():
    asked = []

    def predict(spec):
        asked.append(spec)
        return spec.blank("m", peak_step_bytes=1)

    predictor = Predictor(predict)
    spec = RunSpec(method="lora", budget=7, model="minilm-l6")
    records = [predictor(replace(spec, matched=True)), predictor(replace(spec, equal_trainable="lora[7]"))]
    assert len(asked) == 1
    assert [record.matched for record in records] == [True, None]
    assert len(predictor.records) == 1


def test_what_was_predicted_before_is_not_predicted_again():
    asked = []

    def predict(spec):
        asked.append(spec)
        return spec.blank("minilm-l6", peak_step_bytes=2)

    spec = RunSpec(method="lora", budget=7, model="minilm-l6")
    # A record names the workload's own data, and why its budget was chosen.
    known = replace(spec.blank("minilm-l6", peak_step_bytes=1), matched=True, data="random tokens")
    going_on = Predictor(predict, known=[known, replace(known, budget=8)])
    assert going_on(spec) == replace(known, matched=None)
    assert asked == []
    others = [{"batch": 5}, {"model": "bert-base"}, {"gpu_memory_bytes": GIB}, {"optimizer": "sgd"}, {"data": "trec"}]
    for other in others:
        going_on(replace(spec, **other))
    assert asked == [replace(spec, **other) for other in others]
    assert going_on.records[0] == known
    assert [record.budget for record in going_on.unasked] == [8]


def test_only_this_codes_own_predictions_are_taken_up(tmp_path, monkeypatch):
    facts = {"commit": "a", "python_version": "3", "torch_version": "2", "transformers_version": "5"}
    monkeypatch.setattr(predictor, "environment", lambda device: facts)
    monkeypatch.setattr(predictor, "version", lambda package: "5")
    path = tmp_path / "records.json"
    assert made_before(path) == []
    same = replace(LORA, **facts)
    write([same, *(replace(same, **{name: "9"}) for name in facts), replace(same, status="crashed")], path)
    assert made_before(path) == [same]
    for unknown in (None, "a-dirty"):
        facts["commit"] = unknown
        assert made_before(path) == []


def test_an_ended_claim_goes_on_where_it_was(tiny, monkeypatch, capsys):
    """Ended by an error after the third prediction, then again after the second new one, then not."""
    monkeypatch.setattr(command, "made_before", lambda path: read(path) if path.exists() else [])
    made, real = [], predictor.predict

    def ended(most):
        def run(spec):
            if most is not None and len(made) == most:
                raise KeyboardInterrupt
            made.append(spec)
            return real(spec)

        monkeypatch.setattr(command, "Predictor", partial(Predictor, run))

    arguments = ["claim", "--quick", "--out", str(tiny), "--jobs", "1"]
    for most in (3, 5):
        ended(most)
        with suppress(KeyboardInterrupt):
            cli.main(arguments)
        assert len(read(tiny / "records.json")) == len(made) == most
    ended(None)
    assert cli.main(arguments) == 0
    assert len(made) == len(set(made)) == len(read(tiny / "records.json"))
    assert f"5 predictions of this version are in {tiny / 'records.json'}" in capsys.readouterr().err


def doubled(spec):
    """Stands for a prediction; a function of a module, which other processes can call."""
    if spec.budget == 13:
        raise ValueError("13")
    return spec.blank("m", peak_step_bytes=2 * spec.budget)


def test_several_processes_give_what_one_gives_in_the_same_order():
    spec = RunSpec(method="lora", budget=1, model="minilm-l6")

    def part(predictor, budgets):
        # What is asked next depends on what came: the parts of a claim search.
        return [predictor(replace(spec, budget=budget)).peak_step_bytes // 2 for budget in budgets]

    parts = [[5, 3, 9], [3, 7], [9, 5, 1]]
    found, records = [], []
    for jobs in (1, 2):
        with Predictor(doubled, jobs=jobs) as predictor:
            found.append(predictor.each([partial(part, predictor, budgets) for budgets in parts]))
            records.append([record.budget for record in predictor.records])
    assert found == [parts, parts]
    assert records == [[5, 3, 9, 7, 1]] * 2


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_in_a_part_is_raised_and_what_was_predicted_is_kept(jobs):
    spec = RunSpec(method="lora", budget=1, model="minilm-l6")
    with Predictor(doubled, jobs=jobs) as predictor:
        predictor(spec)
        with pytest.raises(ValueError, match="13"):
            predictor.each([lambda: predictor(replace(spec, budget=13)), lambda: 1])
        assert [record.budget for record in predictor.records] == [1]


@pytest.mark.parametrize("jobs", ["0", "65", "x"])
def test_jobs_out_of_range_are_said(tmp_path, capsys, jobs):
    arguments = ["claim", "--quick", "--out", str(tmp_path / "out"), "--jobs", jobs]
    with suppress(SystemExit):
        assert cli.main(arguments) == 2
    assert "--jobs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_papers_cases_are_named_once():
    assert [case.name for case in CASES] == ["roberta-base", "roberta-large", "llama-2-7b"]
    assert [case.reference for case in CASES] == ["lora[7]", "lora[10]", "lora[32]"]
