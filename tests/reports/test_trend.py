"""The trend page, its files, and its figure: what was planted in a history is what they tell."""

import csv
import hashlib
import io
import itertools
import re
from dataclasses import replace
from html import unescape

import pytest

from reports import page, palette, sheet, trend
from reports.compare import name
from reports.figures import trend as figure
from reports.history import Line, Trend
from reports.record import Record, from_csv
from reports.thresholds import read_thresholds

THRESHOLDS = read_thresholds()
LORA = Record(
    method="lora",
    budget=7,
    model="minilm-l6",
    batch=16,
    seq=64,
    source="predicted",
    torch_version="2.13.0",
    peak_step_bytes=2 * 2**20,
    resident_bytes=2**20,
)
MORE = replace(LORA, peak_step_bytes=2 * 2**20 + 12)
MARKUP = "<script>alert(1)</script>\"'><img src=x>{{ 7*7 }}\u202e\r\0"


def commit(number):
    return hashlib.sha1(str(number).encode()).hexdigest()


def history(*results):
    """A trend in which commit by commit these records were measured, a day after one another."""
    lines = [
        Line.of(records, THRESHOLDS, commit(number), f"2026-01-{number + 1:02}T00:00:00+00:00")
        for number, records in enumerate(results)
    ]
    return Trend.of(lines, THRESHOLDS)


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(trend, "_illustrations", lambda found, out: [])


def text(path):
    """The words of a page, without its style."""
    source = re.sub("(?s)<style>.*?</style>", "", path.read_text(encoding="utf-8"))
    return " ".join(unescape(re.sub("<[^>]*>", " ", source)).split())


def test_the_page_names_commit_date_benchmark_figure_and_change(tmp_path):
    found = history(*[[LORA]] * 3, *[[MORE]] * 2, *[[LORA]] * 2)
    path = trend.write_trend(found, tmp_path)
    assert path == tmp_path / page.TREND_PAGE
    said = text(path)
    assert (
        "7 commits, 2026-01-01 to 2026-01-07, 1 benchmark: 2 moves at 2 commits (1 regression, 1 improvement)" in said
    )
    assert "2 figures were obtained at least once, and 1 of them never moved" in said
    # The newest first.
    assert re.search(
        rf"{commit(5)[:7]} 2026-01-06 lora\[7\] on minilm-l6 .*peak_step_bytes 2.00 MiB 2.00 MiB -12 bytes >-0.01 "
        rf"improvement {commit(3)[:7]} 2026-01-04 lora.*\+12 bytes <0.01 regression",
        said,
    )
    assert (tmp_path / "trend-1.png").read_bytes().startswith(b"\x89PNG")
    alt = re.search('alt="([^"]*)"', path.read_text())[1]
    assert f"regression at {commit(3)[:7]} to 2.00 MiB, improvement at {commit(5)[:7]}" in alt
    assert "<script" not in path.read_text()


@pytest.mark.usefixtures("no_figures")
def test_an_environment_and_a_gap_are_said_beside_the_move(tmp_path):
    head = replace(LORA, method="head")
    other = replace(MORE, torch_version="2.14.0")
    said = text(trend.write_trend(history([LORA], [head], [MORE, head], [replace(other, peak_step_bytes=9)]), tmp_path))
    assert "not comparable not by the commit alone: torch_version 2.13.0 to 2.14.0" in said
    assert f"regression since {commit(0)[:7]}, 2 commits before" in said
    assert re.search(rf"{commit(1)[:7]} 2026-01-02 not measured lora\[7\]", said)
    assert re.search(rf"{commit(2)[:7]} 2026-01-03 measured again lora\[7\]", said)


@pytest.mark.usefixtures("no_figures")
def test_the_files_beside_the_page_have_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(trend, "MOST_ROWS", 1)
    found = history([LORA], [MORE], [LORA])
    assert "1 more stand in moves.csv alone" in text(trend.write_trend(found, tmp_path))
    records = from_csv((tmp_path / "history.csv").read_text())
    assert [(each.commit, each.created_at[:10], each.peak_step_bytes) for each in records] == [
        (commit(0), "2026-01-01", 2 * 2**20),
        (commit(1), "2026-01-02", 2 * 2**20 + 12),
        (commit(2), "2026-01-03", 2 * 2**20),
    ]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "moves.csv").read_text())))
    assert [(row["commit"], row["since"], row["figure"], row["change"], row["verdict"]) for row in rows] == [
        (commit(1), commit(0), "peak_step_bytes", "12", "regression"),
        (commit(2), commit(1), "peak_step_bytes", "-12", "improvement"),
    ]
    assert {(row["by_the_commit"], row["method"], row["budget"]) for row in rows} == {("True", "lora", "7")}


@pytest.mark.usefixtures("no_figures")
def test_one_commit_does_not_crowd_out_the_others(tmp_path):
    many = [replace(LORA, seed=number) for number in range(trend.MOST_OF_A_COMMIT + 5)]
    first = [replace(many[0], resident_bytes=7), *many[1:]]
    found = history(many, first, [replace(each, peak_step_bytes=7) for each in first])
    said = text(trend.write_trend(found, tmp_path))
    assert said.count(f"{commit(2)[:7]} 2026-01-03") == trend.MOST_OF_A_COMMIT
    assert f"{commit(1)[:7]} 2026-01-02" in said
    assert "5 more stand in moves.csv alone" in said


@pytest.mark.usefixtures("no_figures")
def test_hostile_names_are_text(tmp_path):
    hostile = replace(LORA, method=MARKUP, model=MARKUP, data=MARKUP, torch_version=MARKUP)
    crashed = replace(hostile, status="crashed", reason=MARKUP, peak_step_bytes=None, resident_bytes=None)
    found = history([hostile], [replace(hostile, peak_step_bytes=7, torch_version=f"other {MARKUP}")], [crashed])
    source = trend.write_trend(found, tmp_path).read_text(encoding="utf-8")
    assert "<script" not in source
    assert "<img" not in source
    assert "49" not in text(tmp_path / page.TREND_PAGE)
    assert "\u202e" not in source
    rows = list(csv.DictReader(io.StringIO((tmp_path / "moves.csv").read_bytes().decode(), newline="")))
    assert [row["figure"] for row in rows] == ["peak_step_bytes", "status"]
    assert rows[0]["method"] == MARKUP.replace("\0", "\ufffd")


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("results", [[], [[LORA]], [[LORA], [LORA]]])
def test_where_nothing_moved_the_page_says_so(results, tmp_path):
    assert "Nothing moved." in text(trend.write_trend(history(*results), tmp_path))


def test_the_panels_have_a_cap_and_what_is_looked_at_first_comes_first(monkeypatch):
    records = [replace(LORA, seed=number) for number in range(5)]
    found = history(records, [replace(each, resident_bytes=7, peak_step_bytes=7) for each in records])
    monkeypatch.setattr(trend, "MOST_PANELS", 4)
    monkeypatch.setattr(trend, "MOST_DRAWN", 6)
    drawn = trend._drawn(found)
    assert [(moved, len(group)) for moved, group in drawn] == [("peak_step_bytes", 4), ("resident_bytes", 2)]
    assert "4 more figures moved and are not drawn" in " ".join(
        trend.render(found, [page.Illustration((), "", "")]).split()
    )


@pytest.mark.parametrize("number", [1, 3])
def test_the_report_leads_to_the_page_only_where_it_is(number, tmp_path):
    source = page.write_report([], tmp_path, trend=number == 3).read_text()
    assert source.count('href="trend.html"') == (number == 3)


# --- the figure


def drawn(found, layout=sheet.WIDE):
    named = [(name(series.benchmark), series) for series in found.moved]
    drawing = figure.draw(found.entries, named, layout)
    return drawing, drawing.figure.axes


def test_a_level_reaches_half_a_commit_to_both_sides_and_a_mark_stands_where_it_moved():
    _, (ax,) = drawn(history([LORA], [LORA], [replace(LORA, peak_step_bytes=3 * 2**20)]))
    level, mark = ax.lines
    assert list(level.get_xdata()) == [-0.5, 0.5, 0.5, 1.5, 1.5, 2.5]
    assert list(level.get_ydata()) == [2, 2, 2, 2, 3, 3]
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([2], [3])
    assert mark.get_marker() == palette.VERDICT_MARKERS["regression"]
    assert mark.get_markerfacecolor() == palette.VERDICT_COLOURS["regression"]
    # The levels are named, in MiB.
    assert {label.get_text() for label in ax.get_yticklabels()} == {"2.00", "3.00"}


def test_a_move_beside_another_environment_is_hollow_and_a_gap_is_one():
    head = replace(LORA, method="head")
    _, (ax,) = drawn(history([LORA], [head], [replace(MORE, torch_version="2.14.0"), head]))
    level, mark = ax.lines
    assert [value != value for value in level.get_ydata()] == [False, False, True, True, False, False]
    assert mark.get_markerfacecolor() == sheet.THEME.background


def test_a_dozen_bytes_can_be_told_on_the_scale():
    _, (ax,) = drawn(history([LORA], [MORE]))
    assert {label.get_text() for label in ax.get_yticklabels()} == {"2.000000", "2.000011"}


def test_a_ratio_has_its_interval():
    ratio = {"step_time_ratio": 1.0, "step_time_ratio_low": 0.9, "step_time_ratio_high": 1.1}
    slower = {"step_time_ratio": 2.0, "step_time_ratio_low": 1.9, "step_time_ratio_high": 2.2}
    _, (ax,) = drawn(history([replace(LORA, **ratio)], [replace(LORA, **slower)]))
    (band,) = ax.collections
    heights = [y for path in band.get_paths() for _, y in path.vertices]
    assert (min(heights), max(heights)) == (0.9, 2.2)


@pytest.mark.parametrize("layout", [sheet.WIDE, sheet.NARROW])
@pytest.mark.parametrize("number", [2, 100])
def test_names_of_commits_do_not_meet_and_stay_in_their_panel(number, layout):
    days = [[LORA] if number % 2 else [MORE] for number in range(number)]
    lines = [Line.of(records, THRESHOLDS, commit(at), "2026-01-01T00:00:00") for at, records in enumerate(days)]
    drawing, (ax,) = drawn(Trend.of(lines, THRESHOLDS), layout)
    drawing.figure.set_dpi(100)
    left, right = (x * layout.width for x in (ax.get_position().x0, ax.get_position().x1))
    boxes = sorted(
        (box.x0, box.x1) for text in ax.texts if "2026" in text.get_text() for box in [text.get_window_extent()]
    )
    assert len(boxes) >= 2
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(boxes))
    assert left - 1 <= boxes[0][0]
    assert boxes[-1][1] <= right + 1


def test_sizes_of_no_machine_are_not_drawn_to_scale():
    huge = [[replace(LORA, peak_step_bytes=size, source="measured", touched_params=size)] for size in (10**40, 1)]
    found = history(*huge)
    for series in found.moved:
        axes = figure.draw(found.entries, [("huge", series)]).figure.axes
        assert [text.get_text() for text in axes[0].texts].count("too large to draw") == 1


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("0123456789" * 4, "0123456"),
        ("0123456789" * 4 + "-dirty", "0123456-dirty"),
        ("v1.0", "v1.0"),
        ("feature/a-long-name-of-a-branch", "feature/a-long-name…"),
        ("deadbee", "deadbee"),
    ],
)
def test_a_commit_is_shown_by_its_first_digits(given, shown):
    assert figure.short(given) == shown


def test_colours_and_shapes_of_verdicts_are_apart():
    assert len(set(palette.VERDICT_COLOURS.values())) == len(palette.VERDICT_COLOURS)
    assert len(set(palette.VERDICT_MARKERS.values())) == len(palette.VERDICT_MARKERS)
