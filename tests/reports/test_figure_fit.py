from dataclasses import replace

import pytest
from matplotlib.colors import to_hex

from reports import palette, sheet
from reports.capacity import CONTEXT_BYTES
from reports.figures import fit, panels
from reports.record import Record

GIB = 2**30
LORA = Record(
    method="lora",
    budget=7,
    model="llama",
    source="predicted",
    device_semantics="cuda",
    peak_step_bytes=20 * GIB,
    peak_reserved_bytes=23 * GIB,
    peak_preparation_bytes=12 * GIB,
    peak_phase="backward",
)
PREPARED = replace(LORA, method="sparsegrad", peak_preparation_bytes=30 * GIB)
NAMES = ("16 GiB", "24 GiB", "40 GiB", "80 GiB")
REFUSED = Record(method="full", model="llama", source="predicted", status="refused", reason="why")


def axes(*records, layout=sheet.WIDE):
    (ax,) = fit.draw("w", {"all": records}, layout).figure.axes
    return ax


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def legend(*records) -> list[str]:
    return [text.get_text() for text in fit.draw("w", {"all": records}).figure.legends[0].get_texts()]


def whiskers(ax) -> list[list[float]]:
    return [list(line.get_xdata()) for line in ax.lines if line.get_marker() == "|"]


def cards(ax) -> list[float]:
    """Where the lines of cards stand: each has a ground of its own, and so is drawn twice."""
    places = [line.get_xdata()[0] for line in ax.lines if line.get_marker() != "|"]
    assert places[::2] == places[1::2]
    return places[::2]


def test_bar_is_the_context_then_what_is_allocated_then_what_is_cached():
    patches = axes(LORA).patches
    assert [patch.get_width() * GIB for patch in patches] == [CONTEXT_BYTES, 20 * GIB, 3 * GIB]
    ends = [patch.get_x() + patch.get_width() for patch in patches]
    assert [patch.get_x() for patch in patches] == [0, *ends[:-1]]
    assert ends[-1] == 23.5
    assert "23.50 GiB" in texts(axes(LORA))


def test_cache_is_paler_and_predictions_are_hatched():
    context, allocated, cached = axes(LORA).patches
    assert allocated.get_facecolor()[:3] == cached.get_facecolor()[:3]
    assert cached.get_alpha() < 1
    assert allocated.get_alpha() is None
    assert [bool(patch.get_hatch()) for patch in (context, allocated, cached)] == [False, True, True]
    assert "hatched: predicted" in legend(LORA)


# The scale ends with the first card in which all bars end.
@pytest.mark.parametrize(
    ("step", "shown"),
    [(1, [16]), (15, [16]), (15.75, [16, 24]), (23.5, [16, 24]), (39, [16, 24, 40]), (60, [16, 24, 40, 80])],
)
def test_cards_have_lines_with_names_at_their_memory(step, shown):
    record = replace(LORA, peak_step_bytes=int(step * GIB), peak_reserved_bytes=int(step * GIB))
    ax = axes(record)
    assert cards(ax) == shown
    assert {f"{size} GiB" for size in shown} == {text for text in texts(ax) if text in NAMES}
    assert shown[-1] < ax.get_xlim()[1] < shown[-1] * 1.05


def test_scale_holds_what_no_card_does():
    ax = axes(replace(LORA, peak_reserved_bytes=400 * GIB))
    assert cards(ax) == [16, 24, 40, 80]
    assert 400.5 < ax.get_xlim()[1] < 420


def test_names_of_cards_lose_their_unit_and_then_themselves_where_they_stand_close():
    every = replace(LORA, peak_reserved_bytes=70 * GIB)
    assert {"16", "24", "40", "80"} <= set(texts(axes(every, layout=sheet.NARROW)))
    ax = axes(replace(LORA, peak_reserved_bytes=700 * GIB), layout=sheet.NARROW)
    assert "80" in texts(ax)
    assert not {"16", "24", "40"} <= set(texts(ax))
    assert cards(ax) == [16, 24, 40, 80]


def test_preparation_has_a_mark_where_it_needs_more_than_the_step():
    assert whiskers(axes(LORA)) == []
    assert "preparation, if more" not in legend(LORA)
    ax = axes(LORA, PREPARED)
    assert whiskers(ax) == [[20.5, 30.5]]
    assert "30.50 GiB" in texts(ax)
    assert ax.get_xlim()[1] > 30.5
    assert "preparation, if more" in legend(PREPARED)
    # Above what is allocated, below what is held: the mark stands within the bar, which is longer.
    assert whiskers(axes(replace(LORA, peak_preparation_bytes=22 * GIB))) == [[20.5, 22.5]]


def test_colours_are_the_methods():
    ax = axes(LORA, PREPARED)
    filled = [to_hex(patch.get_facecolor()) for patch in ax.patches]
    assert filled[1] == palette.method_colour("lora")
    assert filled[4] == palette.method_colour("sparsegrad")


def test_refused_has_no_bar_and_says_why():
    ax = axes(REFUSED, LORA)
    assert len(ax.patches) == 3
    assert "not obtained (refused: why)" in texts(ax)
    assert "predicted, refused" in texts(ax)
    assert not any(text.startswith("0") for text in texts(ax))


@pytest.mark.parametrize("name", ["peak_step_bytes", "peak_reserved_bytes", "peak_preparation_bytes"])
def test_a_need_that_is_not_known_whole_has_no_bar(name):
    ax = axes(replace(LORA, **{name: None}))
    assert ax.patches[:] == []
    assert panels.NOT_OBTAINED in texts(ax)


def test_a_size_past_every_machine_is_printed_and_leaves_the_scale_alone():
    ax = axes(LORA, replace(LORA, peak_reserved_bytes=10**400))
    assert cards(ax) == [16, 24]
    assert panels.TOO_LARGE in texts(ax)


def test_words_say_what_is_needed_and_what_it_is_to_each_card():
    text = fit.describe("llama", {"all": [LORA, PREPARED], "none": [REFUSED]}).replace("\u00a0", " ")
    cards = "does not fit in 16 GiB, fits in 24 GiB, fits in 40 GiB, fits in 80 GiB"
    assert f"train_rest all: lora[7] needs 23.50 (backward): {cards}; sparsegrad[7] needs 30.50 (preparation)" in text
    assert "train_rest none: full not obtained (refused: why)" in text
