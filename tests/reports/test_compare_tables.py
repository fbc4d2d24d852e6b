"""A comparison as text, Markdown and data: what is said, and that a hostile name stays text."""

import html
import json
import re
from dataclasses import replace

import pytest

from reports import compare_tables as out
from reports.compare import compare
from reports.record import Record
from reports.thresholds import Threshold, read_thresholds

THRESHOLDS = read_thresholds()
LORA = Record(
    method="lora",
    budget=7,
    model="minilm-l6",
    batch=16,
    seq=64,
    lr=1e-4,
    resident_bytes=2**20,
    peak_step_bytes=100 * 2**20,
    activation_bytes=2**20,
    trainable_params=1_000_000,
    fits=True,
    step_time_ratio=1.0,
    step_time_ratio_low=0.9,
    step_time_ratio_high=1.1,
    commit="c" * 40,
    torch_version="2.13.0+cpu",
)
FULL = replace(LORA, method="full", budget=None)
HEAD = replace(LORA, method="head", budget=None)
WORSE = replace(
    LORA,
    peak_step_bytes=150 * 2**20,
    resident_bytes=2**20 + 4,
    trainable_params=1_000_100,
    fits=False,
    step_time_ratio=1.5,
    step_time_ratio_low=1.4,
    step_time_ratio_high=1.6,
)
HOSTILE = (
    "x|y\nz\r# `b` <img src=q onerror=alert(1)> [l](http://e.example) www.e.example @me **s** _u_ \\ "
    "\x1b[31m \u202e \ud800"
)


def rows(markdown):
    return [
        [html.unescape(cell.strip()) for cell in line.strip("| ").split(" | ")]
        for line in markdown.splitlines()
        if line.startswith("| ")
    ]


def test_what_moved_with_both_figures_and_the_change_in_words_of_its_kind():
    comparison = compare([LORA, FULL], [WORSE, replace(FULL, peak_step_bytes=50 * 2**20)], THRESHOLDS)
    written = rows(out.markdown(comparison))[1:]
    where = "lora[7] on minilm-l6, 16 x 64, float32"
    better = "full on minilm-l6, 16 x 64, float32"
    assert {tuple(row) for row in written} == {
        ("regression", "peak_step_bytes", "100.00 MiB", "150.00 MiB", "+52,428,800 bytes", "+50.00", where),
        # Four bytes of a MiB: told to the byte, and as a share that is not 0.
        ("regression", "resident_bytes", "1.00 MiB", "1.00 MiB", "+4 bytes", "<0.01", where),
        ("regression", "trainable_params", "1,000,000", "1,000,100", "+100", "+0.01", where),
        ("regression", "fits", "yes", "no", "—", "—", where),
        ("regression", "step_time_ratio", "1.0000 (0.90 to 1.10)", "1.5000 (1.40 to 1.60)", "+0.5000", "+50.00", where),
        ("improvement", "peak_step_bytes", "100.00 MiB", "50.00 MiB", "-52,428,800 bytes", "-50.00", better),
    }
    # The same rows in the same order for a terminal.
    lines = out.text(comparison).splitlines()
    assert [re.split(r" {2,}", line) for line in lines[1 : 1 + len(written)]] == written


def test_the_closing_line_counts_everything():
    comparison = compare([LORA, HEAD], [WORSE, FULL], THRESHOLDS)
    last = out.text(comparison).splitlines()[-1]
    assert last == out.summary(comparison)
    # Five figures moved of lora's six that are tracked and known: the activations did not.
    assert last == ("1 benchmark compared in 6 figures: 5 regressions, 1 benchmark missing, 1 new benchmark")
    assert out.text(compare([LORA], [LORA], THRESHOLDS)) == "1 benchmark compared in 6 figures: nothing moved\n"


def test_missing_new_and_other_circumstances_are_each_a_line():
    reference = [LORA, HEAD, replace(FULL, source="predicted")]
    new = [replace(LORA, torch_version="2.14.0"), replace(HEAD, budget=3), FULL]
    written = out.text(compare(reference, new, THRESHOLDS)).splitlines()
    assert [line.split(": ")[0] for line in written[:-1]] == ["missing", "not comparable", "new", "environment"]
    assert "the new results have it with budget 3 instead of —" in written[0]
    assert "the new results are of source measured instead of predicted" in written[1]
    assert written[3] == (
        "environment: torch_version was 2.13.0 and is 2.14.0 in 1 benchmark, which matters to all figures; "
        "they are not judged"
    )


@pytest.mark.parametrize("how", ["move", "missing", "new", "status"])
def test_a_hostile_name_stays_text(how):
    hostile = replace(LORA, model=HOSTILE, data=HOSTILE)
    reference, new = {
        "move": ([hostile], [replace(hostile, resident_bytes=2**21)]),
        "missing": ([LORA, hostile], [LORA]),
        "new": ([LORA], [LORA, hostile]),
        "status": ([LORA], [replace(LORA, status="crashed", reason=HOSTILE)]),
    }[how]
    comparison = compare(reference, new, THRESHOLDS)
    written = out.markdown(comparison)
    text = out.text(comparison)
    # It is there, on one line, and shows each character that acts on a terminal.
    shown = "x|y\\nz\\r# `b` <img src=q onerror=alert(1)>"
    assert shown in text
    assert shown in html.unescape(written)
    assert all(character.isprintable() for line in text.splitlines() for character in line)
    text.encode()
    (line,) = [line for line in written.splitlines() if "onerror" in line]
    assert not re.search(r"[<>`\[\]*\\@_]|www\.|https?:", line)
    if how in ("move", "status"):
        assert line.count("|") == len(out.HEADINGS) + 1
    assert len(written.splitlines()) == len(out.markdown(compare(*benign(how), THRESHOLDS)).splitlines())


def benign(how):
    other = replace(LORA, model="other")
    return {
        "move": ([LORA], [replace(LORA, resident_bytes=2**21)]),
        "missing": ([LORA, other], [LORA]),
        "new": ([LORA], [LORA, other]),
        "status": ([LORA], [replace(LORA, status="crashed", reason="why")]),
    }[how]


def test_a_long_summary_is_cut_and_says_so():
    reference = [replace(LORA, seed=seed) for seed in range(out.MOST_LINES + 7)]
    new = [replace(record, resident_bytes=2**21) for record in reference]
    written = out.markdown(compare(reference, new, THRESHOLDS))
    assert len(rows(written)) == 1 + out.MOST_LINES
    assert "... and 7 more figures that moved." in written
    assert len(out.text(compare(reference, new, THRESHOLDS)).splitlines()) > out.MOST_LINES + 7


def test_the_data_hold_what_moved_and_its_benchmark():
    comparison = compare([LORA, HEAD], [WORSE, FULL], THRESHOLDS)
    data = json.loads(json.dumps(out.data(comparison, ["regression", "missing"]), allow_nan=False))
    assert data["problems"] == ["regression", "missing"]
    assert (data["counts"]["regression"], data["counts"]["improvement"]) == (5, 0)
    (peak,) = [move for move in data["moves"] if move["figure"] == "peak_step_bytes"]
    assert (peak["old"], peak["new"], peak["change"], peak["share"]) == (100 * 2**20, 150 * 2**20, 50 * 2**20, 0.5)
    assert (peak["benchmark"]["method"], peak["benchmark"]["budget"], peak["verdict"]) == ("lora", "7", "regression")
    (time,) = [move for move in data["moves"] if move["figure"] == "step_time_ratio"]
    assert (time["old_interval"], time["new_interval"], time["change"]) == ([0.9, 1.1], [1.4, 1.6], 0.5)
    assert [each["benchmark"]["method"] for each in data["missing"]] == ["head"]
    assert [each["benchmark"]["method"] for each in data["new"]] == ["full"]


def test_what_github_action_benchmark_reads():
    lost = replace(HEAD, status="oom")
    entries = out.smaller_is_better([LORA, lost], THRESHOLDS | {"resident_bytes": Threshold("ignore")})
    # Neither counts, of which less is not better, nor what the peak consists of, nor a run without figures.
    assert [(entry["value"], entry["unit"]) for entry in entries] == [(100 * 2**20, "bytes"), (1.0, "of full's")]
    assert [entry["name"].rsplit(": ")[1] for entry in entries] == ["peak_step_bytes", "step_time_ratio"]
    assert entries[1]["range"] == "0.9 to 1.1"
    assert "range" not in entries[0]
    assert f"commit {'c' * 40}" in entries[0]["extra"]
    # A chart is found by its name: it must not hang on what else was run.
    assert entries == out.smaller_is_better([LORA], THRESHOLDS | {"resident_bytes": Threshold("ignore")})
    assert len({entry["name"] for entry in out.smaller_is_better([LORA, FULL], THRESHOLDS)}) == 6
