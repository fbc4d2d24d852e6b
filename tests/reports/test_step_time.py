import math
from dataclasses import replace

import pytest

from reports import palette, sheet, tables
from reports.figures import panels, step_time
from reports.record import Record

ONE = Record(
    method="lora",
    budget=7,
    model="m",
    step_time_s=0.125,
    step_time_ratio=0.5,
    step_time_ratio_low=0.4,
    step_time_ratio_high=0.7,
    pairing="rounds",
)
NONE = Record(method="sparsegrad", model="m", step_time_s=0.25)


def drawn(*records, layout=sheet.NARROW):
    figure = step_time.draw("w", {"all": records}, layout).figure
    (ax,) = figure.axes
    return ax, [text.get_text() for text in ax.texts]


def intervals(ax):
    return [line for line in ax.lines if line.get_marker() == "|"]


def markers(ax):
    return [line for line in ax.lines if line.get_marker() == "o"]


def test_marker_and_interval_stand_at_their_values():
    ax, texts = drawn(ONE)
    (marker,), (interval,) = markers(ax), intervals(ax)
    assert list(marker.get_xdata()) == [0.5]
    assert list(interval.get_xdata()) == [0.4, 0.7]
    assert set(interval.get_ydata()) == set(marker.get_ydata())
    assert marker.get_markerfacecolor() == palette.method_colour("lora")
    assert ax.get_xscale() == "log"
    assert "0.50 (0.40 to 0.70)" in texts
    assert "125.00 ms" in texts


def test_line_at_one_stands_at_each_record_and_crosses_no_text():
    ax, _ = drawn(ONE, NONE)
    (line,) = [line for line in ax.lines if set(line.get_xdata()) == {1}]
    ends = [y for y in line.get_ydata() if not math.isnan(y)]
    segments = list(zip(ends[::2], ends[1::2], strict=True))
    assert len(segments) == 2
    (marker,) = markers(ax)
    assert segments[0][0] < marker.get_ydata()[0] < segments[0][1]
    for text in ax.texts:
        if text.get_fontstyle() != "italic":
            assert not any(low - 5 < text.get_position()[1] < high + 5 for low, high in segments)


def test_scale_holds_every_interval_and_one():
    ax, _ = drawn(ONE, replace(ONE, step_time_ratio=30.0, step_time_ratio_low=20.0, step_time_ratio_high=45.0))
    low, high = ax.get_xlim()
    assert low < 0.4
    assert high > 45
    # A small effect is not blown up to the width of the page.
    ax, _ = drawn(replace(ONE, step_time_ratio=1.01, step_time_ratio_low=1.0, step_time_ratio_high=1.02))
    low, high = ax.get_xlim()
    assert low < 0.5
    assert high > 2


@pytest.mark.parametrize(("low", "high"), [(0.5, 2.0), (0.04, 3.0), (1e-4, 1e4), (0.99, 1.01)])
def test_ticks_are_few_round_and_inside(low, high):
    found = step_time.ticks(low, high)
    assert 1.0 in found
    assert len(found) <= 9
    assert all(low <= tick <= high for tick in found)


def test_missing_ratio_says_so_beside_the_plain_time():
    ax, texts = drawn(NONE)
    assert markers(ax) == []
    assert "ratio not obtained" in texts
    assert "250.00 ms" in texts


def test_missing_everything_says_why():
    failed = replace(NONE, step_time_s=None, status="oom", reason="card full")
    _, texts = drawn(failed)
    assert "ratio not obtained (oom: card full)" in texts
    assert "time not obtained, oom" in texts


def test_interval_that_is_missing_is_not_drawn():
    ax, texts = drawn(replace(ONE, step_time_ratio_high=None))
    assert intervals(ax) == []
    assert len(markers(ax)) == 1
    assert "0.50 (no interval)" in texts


@pytest.mark.parametrize(("ratio", "note"), [(0.0, "0 (no place"), (1e300, "too large"), (1e-300, "too large or too")])
def test_ratio_off_the_scale_is_said_and_leaves_it_alone(ratio, note):
    ax, texts = drawn(ONE, replace(ONE, step_time_ratio=ratio, step_time_ratio_high=1e300))
    assert len(markers(ax)) == 1
    assert any(text.startswith(note) for text in texts)
    assert ax.get_xlim() == drawn(ONE)[0].get_xlim()


def test_blocks_control_and_prediction_are_told_in_words():
    full = replace(ONE, method="full", budget=None, step_time_ratio=1.0)
    ax, texts = drawn(full, replace(ONE, pairing="blocks"), replace(ONE, source="predicted"))
    assert sum("A/A control" in text for text in texts) == 1
    assert sum("paired in blocks" in text for text in texts) == 1
    assert sum("predicted" in text for text in texts) == 1
    assert [line.get_markerfacecolor() == palette.LIGHT.background for line in markers(ax)] == [False, False, True]
    # What tells rows apart is what was run: the pairing stands in words of its own.
    assert not any("pairing" in text for text in texts)


def test_full_without_a_ratio_is_no_control():
    _, texts = drawn(replace(NONE, method="full"))
    assert not any("A/A" in text for text in texts)


def test_words_say_what_is_drawn():
    text = step_time.describe("roberta", {"all": [ONE], "none": [replace(ONE, method="full", pairing="blocks"), NONE]})
    assert "99% intervals" in text
    assert "lora[7] 0.50 (0.40 to 0.70), 125.00 ms" in text
    assert "full[7] 0.50 (0.40 to 0.70), 125.00 ms, A/A control, paired in blocks" in text
    assert f"sparsegrad ratio {panels.NOT_OBTAINED}, 250.00 ms" in text


def test_ratio_in_words():
    assert tables.time_ratio(ONE) == "0.50 (0.40 to 0.70)"
    assert tables.time_ratio(replace(ONE, step_time_ratio=1234.5, step_time_ratio_low=None)) == "1,234.50 (no interval)"
    assert tables.time_ratio(NONE) == tables.MISSING
