"""A history of results: lines on disk, and which commit moved what, in histories where that was planted."""

import json
from dataclasses import replace

import pytest

from reports import history as module
from reports.compare import CHANGE, IMPROVEMENT, INCOMPARABLE, REGRESSION, identify
from reports.history import History, Line, Trend
from reports.record import Record, RecordError
from reports.thresholds import Threshold, read_thresholds

THRESHOLDS = read_thresholds()
WHEN = "2026-01-02T03:04:05+00:00"
LORA = Record(
    method="lora",
    budget=7,
    model="minilm-l6",
    batch=16,
    seq=64,
    source="predicted",
    torch_version="2.13.0+cpu",
    device_name="AMD EPYC",
    peak_step_bytes=1000,
    resident_bytes=500,
    trainable_params=70,
)
HEAD = replace(LORA, method="head", budget=None, peak_step_bytes=300)
TIMED = replace(
    LORA, source="measured", step_time_ratio=1.0, step_time_ratio_low=0.98, step_time_ratio_high=1.02, threads=2
)


def line(commit, *records, when=WHEN):
    return Line.of(records, THRESHOLDS, commit, when)


def trend(*lines):
    return Trend.of(lines, THRESHOLDS)


def told(found):
    """Each move as commit, figure, old, new, verdict, and whether it is laid to the commit."""
    return [
        (
            found.entries[each.position].commit,
            each.move.figure,
            each.move.old,
            each.move.new,
            each.move.verdict,
            each.by_the_commit,
        )
        for each in found.moves
    ]


def timed(ratio, margin=0.02, **others):
    return replace(
        TIMED, step_time_ratio=ratio, step_time_ratio_low=ratio - margin, step_time_ratio_high=ratio + margin, **others
    )


# --- which commit moved what


def test_the_commit_that_moved_a_figure_is_named_and_so_is_the_one_that_moved_it_back():
    more = replace(LORA, peak_step_bytes=1012)
    history = [line(f"c{number}", more if 12 <= number < 20 else LORA, HEAD) for number in range(30)]
    found = trend(*history)
    assert told(found) == [
        ("c12", "peak_step_bytes", 1000, 1012, REGRESSION, True),
        ("c20", "peak_step_bytes", 1012, 1000, IMPROVEMENT, True),
    ]
    assert {each.move.benchmark for each in found.moves} == {identify(LORA)}
    (series,) = found.moved
    assert series.values == (1000,) * 12 + (1012,) * 8 + (1000,) * 10
    # Two benchmarks of three figures each.
    assert (found.figures, len(found.benchmarks)) == (6, 2)


def test_of_one_commit_the_most_severe_move_comes_first():
    moved = replace(LORA, resident_bytes=400, peak_step_bytes=1001, trainable_params=140)
    assert [figure for _, figure, *_ in told(trend(line("a", LORA), line("b", moved)))] == [
        "trainable_params",
        "peak_step_bytes",
        "resident_bytes",
    ]


def test_a_move_beside_another_environment_is_not_laid_to_the_commit():
    other = replace(LORA, torch_version="2.14.0+cpu", peak_step_bytes=1100)
    found = trend(line("a", LORA), line("b", other), line("c", replace(other, peak_step_bytes=1200)))
    assert told(found) == [
        ("b", "peak_step_bytes", 1000, 1100, INCOMPARABLE, False),
        ("c", "peak_step_bytes", 1100, 1200, REGRESSION, True),
    ]
    assert found.moves[0].move.environment == (("torch_version", "2.13.0", "2.14.0"),)


def test_another_processor_matters_to_times_and_not_to_the_trackers_bytes():
    found = trend(line("a", TIMED), line("b", timed(1.5, device_name="Intel", peak_step_bytes=1001)))
    assert {(figure, verdict, alone) for _, figure, _, _, verdict, alone in told(found)} == {
        ("step_time_ratio", INCOMPARABLE, False),
        ("peak_step_bytes", REGRESSION, True),
    }


def test_a_figure_that_is_lost_beside_another_environment_is_not_laid_to_the_commit():
    lost = replace(LORA, torch_version="2.14.0+cpu", resident_bytes=None)
    assert told(trend(line("a", LORA), line("b", lost))) == [("b", "resident_bytes", 500, None, REGRESSION, False)]


def test_a_benchmark_that_goes_and_comes_back_is_set_against_what_it_was():
    found = trend(line("a", LORA), line("b", HEAD), line("c", replace(LORA, peak_step_bytes=1001), HEAD))
    assert told(found) == [("c", "peak_step_bytes", 1000, 1001, REGRESSION, False)]
    assert found.moves[0].since == 0
    lora, head = identify(LORA), identify(HEAD)
    assert [(each.position, each.benchmark, each.what) for each in found.presences] == [
        (1, head, "new"),
        (1, lora, "not measured"),
        (2, lora, "measured again"),
    ]
    assert found.moved[0].values == (1000, None, 1001)


def test_what_moved_while_runs_failed_is_told_once_they_end_ok_again():
    crashed = Record(method="lora", budget=7, model="minilm-l6", batch=16, seq=64, source="predicted", status="crashed")
    found = trend(line("a", LORA), line("b", crashed), line("c", replace(LORA, peak_step_bytes=1001)))
    assert told(found) == [
        ("b", "status", "ok", "crashed", REGRESSION, True),
        ("c", "peak_step_bytes", 1000, 1001, REGRESSION, False),
        ("c", "status", "crashed", "ok", IMPROVEMENT, True),
    ]
    assert [each.since for each in found.moves] == [0, 0, 1]
    assert [series.figure for series in found.moved] == ["peak_step_bytes"]


def test_many_small_steps_are_a_move_since_the_first_of_them():
    # Each step is 4 %, which is no move; the third is past a tenth, and 1.12 begins anew.
    ratios = (1.0, 1.04, 1.08, 1.12, 1.16, 1.2)
    found = trend(*(line(f"c{number}", timed(ratio)) for number, ratio in enumerate(ratios)))
    assert told(found) == [("c3", "step_time_ratio", 1.0, 1.12, REGRESSION, False)]
    assert found.moves[0].since == 0
    # The interval goes with its ratio.
    assert found.moves[0].move.old_interval == (0.98, 1.02)


def test_noise_about_a_level_is_no_move():
    ratios = (1.0, 1.06, 0.95, 1.05, 0.97)
    assert told(trend(*(line(f"c{number}", timed(ratio, 0.06)) for number, ratio in enumerate(ratios)))) == []


def test_a_dirty_commit_is_one_of_its_own():
    found = trend(
        line("a" * 40, LORA), line("b" * 40 + "-dirty", replace(LORA, peak_step_bytes=7)), line("b" * 40, LORA)
    )
    assert [commit for commit, *_ in told(found)] == ["b" * 40 + "-dirty", "b" * 40]


def test_of_a_commit_measured_twice_the_last_counts_at_its_first_place():
    wrong = replace(LORA, peak_step_bytes=7)
    again = line("a", LORA, when="2026-02-01T00:00:00+00:00")
    found = trend(line("a", wrong, HEAD), line("b", LORA, HEAD), again)
    assert [(entry.commit, entry.when[:7]) for entry in found.entries] == [("a", "2026-02"), ("b", "2026-01")]
    # What the second measurement lacks is there from the first.
    assert (told(found), found.presences) == ([], ())


def test_a_figure_is_compared_only_where_both_lines_tracked_it():
    loose = {**THRESHOLDS, "peak_step_bytes": Threshold("ignore")}
    without = Line.of([LORA], loose, "b", WHEN)
    assert without.records[0].peak_step_bytes is None
    assert told(trend(line("a", LORA), without, line("c", replace(LORA, peak_step_bytes=7)))) == []
    assert told(Trend.of([line("a", LORA), line("b", replace(LORA, peak_step_bytes=7))], loose)) == []


def test_no_lines_are_no_trend():
    found = trend()
    assert (found.entries, found.moves, found.moved, found.figures) == ((), (), (), 0)


# --- the file


def test_lines_are_read_as_they_were_written(tmp_path):
    written = History(tmp_path / "new" / "history.jsonl")
    refused = replace(HEAD, status="refused", reason="x" * 999, peak_step_bytes=None)
    lines = [line("a", LORA, refused), line("feature/b", timed(1.5), when="2026-01-03T00:00:00+00:00")]
    for each in lines:
        written.append(each)
    found = History.read(written.path).lines
    assert found == lines == written.lines
    assert found[0].records[0] == LORA
    assert len(found[0].records[1].reason) == module.LONGEST_REASON
    assert found[1].records[0] == timed(1.5)
    raw = json.loads(written.path.read_text().splitlines()[0])
    assert (raw["schema"], raw["commit"], raw["when"]) == (1, "a", WHEN)
    assert (raw["common"]["torch_version"], raw["common"]["device_name"]) == ("2.13.0+cpu", "AMD EPYC")


def test_only_what_compare_asks_for_is_kept():
    whole = replace(LORA, commit="c", created_at="now", step_time_s=1.0, loss_last=2.0, kernel_workspace_bytes=3)
    assert line("a", whole).records == (LORA,)


@pytest.mark.parametrize("kept", [1, 11, 40, -1])
def test_a_last_line_that_was_cut_short_is_dropped_and_gives_its_place(kept, tmp_path):
    path = tmp_path / "history.jsonl"
    history = History(path)
    history.append(line("a", LORA))
    whole = path.read_bytes()
    history.append(line("b", HEAD))
    path.write_bytes(whole + path.read_bytes()[len(whole) :][:kept])
    cut = path.read_bytes()
    found = History.read(path)
    assert found.lines == [line("a", LORA)]
    assert path.read_bytes() == cut  # reading changes nothing
    found.append(line("c", HEAD))
    assert History.read(path).lines == [line("a", LORA), line("c", HEAD)]


def test_another_file_without_a_last_end_of_line_is_not_taken_for_a_cut_line(tmp_path):
    path = tmp_path / "precious.json"
    path.write_text('[{"method": "lora"}]')
    with pytest.raises(RecordError, match="line 1, is not of a history"):
        History.read(path)
    assert path.read_text() == '[{"method": "lora"}]'


GOOD = json.loads(line("a", LORA).dumps())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2 is not readable here"),
        ({"more": 1}, "a line has the keys"),
        ({"when": "yesterday"}, "when must be a time"),
        ({"when": 5}, "when must be a time"),
        ({"commit": "a b"}, "commit must be a commit's name"),
        ({"commit": "<b>"}, "commit must be a commit's name"),
        ({"commit": "a" * 101}, "commit must be a commit's name"),
        ({"commit": None}, "commit must be a commit's name"),
        ({"figures": ["timeline"]}, "figures must be"),
        ({"figures": ["method"]}, "figures must be"),
        ({"figures": [["resident_bytes"]]}, "figures must be"),
        ({"benchmarks": []}, "it holds no benchmark"),
        ({"benchmarks": [1]}, "benchmarks a list of objects"),
        ({"benchmarks": [{}, {}]}, "a benchmark is there twice"),
        ({"benchmarks": [{"peak_step_bytes": -1}]}, "must not be negative"),
        ({"benchmarks": [{"peak_step_bytes": "1"}]}, "must be an integer"),
        ({"benchmarks": [{"timeline": "{}"}]}, "a benchmark has no field 'timeline' here"),
        ({"common": {**GOOD["common"], "schema_version": 99}}, "schema_version 99 is not readable"),
    ],
)
def test_a_line_that_is_none_is_refused_with_its_number(change, message, tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps({**GOOD, **change})}\n")
    with pytest.raises(RecordError, match=message) as error:
        History.read(path)
    assert str(error.value).startswith(f"{path}, line 2, is not of a history: ")


def test_a_history_has_bounds(tmp_path, monkeypatch):
    history = History(tmp_path / "history.jsonl")
    history.append(line("a", LORA, HEAD))
    before = history.path.read_bytes()
    monkeypatch.setattr(module, "MOST_MEASUREMENTS", 3)
    with pytest.raises(RecordError, match=r"nothing was appended .* more than 3 benchmarks"):
        history.append(line("b", LORA, HEAD))
    monkeypatch.setattr(module, "MOST_MEASUREMENTS", 1)
    with pytest.raises(RecordError, match="line 1, is not of a history: more than 1 benchmarks"):
        History.read(history.path)
    monkeypatch.setattr(module, "MOST_BYTES", len(before) + 9)
    with pytest.raises(RecordError, match="nothing was appended"):
        history.append(line("b", LORA))
    assert history.path.read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new", "verdict"), [(None, 7, CHANGE), (7, None, REGRESSION)], ids=["not before", "no longer"]
)
def test_a_figure_that_was_not_obtained_is_no_number(old, new, verdict):
    found = trend(*(line(commit, replace(LORA, resident_bytes=value)) for commit, value in (("a", old), ("b", new))))
    assert told(found) == [("b", "resident_bytes", old, new, verdict, True)]
