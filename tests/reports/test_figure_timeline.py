import itertools
from dataclasses import replace

import pytest

from reports import palette, sheet
from reports.figures import panels, timeline
from reports.record import BREAKDOWN, Record
from reports.timeline import Timeline

MIB = 2**20
# Forward 0 to 2, backward to 6, nothing in the optimizer, zero_grad to 8.
PHASES = (("forward", 0), ("backward", 2), ("optimizer", 6), ("zero_grad", 6))
AT = (0, 1, 2, 4, 6, 8)
TEMPORARY = (0, 1, 0, 5, 2, 0)


def series(temporary=TEMPORARY, phases=PHASES, at=AT) -> str:
    """Parameters of 10 MiB, no basis, optimizer state of 20 MiB, no gradients or activations, and temporaries."""
    flat = {"parameter_bytes": 10, "optimizer_bytes": 20}
    by_category = {name: tuple(flat.get(name, 0) * MIB for _ in at) for name in BREAKDOWN}
    by_category["temporary_bytes"] = tuple(size * MIB for size in temporary)
    return Timeline(phases, at, by_category).dumps()


ONE = Record(method="lora", budget=7, model="m", timeline=series())
NONE = Record(method="sparsegrad", budget=0.1, model="m")


def panel(record, layout=sheet.WIDE):
    (ax,) = timeline.draw("w", {"all": [record]}, layout).figure.axes
    return ax, [text.get_text() for text in ax.texts]


def height_at(polygon, place: float) -> float:
    """The top of a stepped area over `place`, which must not be a corner."""
    corners = polygon.get_xy()
    return max(a[1] for a, b in itertools.pairwise(corners) if a[1] == b[1] and a[0] < place < b[0])


@pytest.mark.parametrize(
    ("place", "temporary"),
    [
        (0.25, 0),  # from instant 0
        (0.75, 1),  # from instant 1, half of the forward's two
        (1.25, 0),  # from instant 2, where backward begins
        (1.75, 5),  # from instant 4, half of the backward's four
        (2.5, 2),  # the optimizer does nothing: the state at instant 6
        (3.5, 2),  # until instant 8, where zero_grad ends
    ],
)
def test_areas_stack_to_the_bytes_of_their_instant(place, temporary):
    ax, _ = panel(ONE)
    # Drawn from the whole down to the lowest; what is never there is not drawn.
    found = [height_at(patch, place) for patch in ax.patches]
    assert found == pytest.approx([30 + temporary, 30, 10])
    colours = [palette.CATEGORY_COLOURS[name] for name in ("temporary_bytes", "optimizer_bytes", "parameter_bytes")]
    assert [sheet.matplotlib.colors.to_hex(patch.get_facecolor()) for patch in ax.patches] == colours


def test_phases_are_equally_wide_marked_and_named():
    ax, texts = panel(ONE)
    assert ax.get_xlim() == (0, len(PHASES))
    boundaries = [
        line.get_xdata()[0] for line in ax.lines if line.get_linestyle() != "-" and len(line.get_xdata()) == 2
    ]
    assert boundaries == [1, 2, 3]
    places = {text.get_text(): text.get_position()[0] for text in ax.texts}
    assert [places[name] for name, _ in PHASES] == [0.5, 1.5, 2.5, 3.5]
    assert {name for name, _ in PHASES} <= set(texts)


def test_phase_names_are_short_where_long_ones_do_not_fit():
    first, _ = timeline.draw("w", {"all": [ONE, ONE]}, sheet.NARROW).figure.axes
    assert {"fwd", "bwd", "opt", "zero"} <= {text.get_text() for text in first.texts}


def test_peak_is_marked_where_it_is_and_labelled():
    ax, texts = panel(ONE)
    (marker,) = [line for line in ax.lines if line.get_marker() == "v"]
    assert list(marker.get_xdata()) == [1.5]  # instant 4
    assert 35 < marker.get_ydata()[0] < ax.get_ylim()[1]
    assert "▼ 35.00 MiB" in texts
    assert "lora[7]" in texts


def test_panels_share_one_scale_and_stand_in_a_grid():
    large = replace(ONE, timeline=series(tuple(100 * size for size in TEMPORARY)))
    figure = timeline.draw("w", {"all": [ONE, large, ONE, ONE, ONE]}, sheet.WIDE).figure
    (limits,) = {ax.get_ylim() for ax in figure.axes}
    assert limits[0] == 0
    assert 530 < limits[1] < 700
    boxes = [ax.get_position() for ax in figure.axes]
    assert len({round(box.x0, 6) for box in boxes}) == sheet.WIDE.tiles
    assert len({round(box.y0, 6) for box in boxes}) == 2
    # The scale is written once a row.
    assert [ax.yaxis.get_major_ticks()[0].label1.get_visible() for ax in figure.axes] == [
        True,
        False,
        False,
        False,
        True,
    ]


def test_missing_timeline_is_an_empty_panel_that_says_so():
    ax, texts = panel(replace(NONE, status="oom", reason="card full"))
    assert ax.patches[:] == []
    assert ax.lines[:] == []
    assert "not obtained (oom: card full)" in texts
    assert "oom" in texts


def test_sizes_of_no_machine_are_not_drawn_and_leave_the_scale_alone():
    huge = replace(ONE, timeline=series(tuple(10**40 * size for size in TEMPORARY)))
    first, second = timeline.draw("w", {"all": [ONE, huge]}).figure.axes
    assert first.get_ylim()[1] < 50
    assert panels.TOO_LARGE in [text.get_text() for text in second.texts]


def test_nothing_live_is_drawn_as_nothing():
    nothing = Timeline((("forward", 0),), (0,), dict.fromkeys(BREAKDOWN, (0,))).dumps()
    ax, texts = panel(replace(ONE, timeline=nothing))
    assert ax.patches[:] == []
    assert "▼ 0 MiB" in texts


def test_predicted_is_hatched_and_said():
    ax, texts = panel(replace(ONE, source="predicted"))
    assert all(patch.get_hatch() for patch in ax.patches)
    assert "predicted" in texts
    assert not any(patch.get_hatch() for patch in panel(ONE)[0].patches)


def test_thinning_keeps_the_least_and_the_most_of_each_pixel():
    at = tuple(range(4000))
    spikes = [7] * len(at)
    spikes[1234], spikes[2345] = 99, 0
    steps = timeline.Steps.of(Timeline.loads(series(tuple(spikes), (("forward", 0),), at), BREAKDOWN))
    kept = steps.kept(100)
    assert {0, 1234, 2345, 3999} <= set(kept)
    assert len(kept) <= 3 * 101
    assert kept == sorted(set(kept))
    assert timeline.Steps.of(Timeline.loads(series(), BREAKDOWN)).kept(1000) == list(range(len(AT)))


def test_peaks_of_phases_count_the_state_they_begin_with():
    steps = timeline.Steps.of(Timeline.loads(series(), BREAKDOWN))
    assert steps.peaks == tuple((30 + most) * MIB for most in (1, 5, 2, 2))
    assert steps.top == 35 * MIB


def test_words_say_the_peak_of_each_phase():
    text = timeline.describe("roberta", {"all": [ONE, NONE], "none": [replace(ONE, source="predicted")]})
    each = "forward 31.00, backward 35.00, optimizer 32.00, zero_grad 32.00"
    assert f"roberta: small stacked areas, the most MiB live in each phase. train_rest all: lora[7] {each}" in text
    assert "sparsegrad[0.1] not obtained" in text
    assert f"{each} (predicted)" in text


def test_phase_names_that_do_not_fit_are_left_out():
    many = tuple((f"phase {number}", number) for number in range(60))
    ax, texts = panel(replace(ONE, timeline=series((1,) * 60, many, tuple(range(60)))), sheet.NARROW)
    assert not any(text.startswith("phas") for text in texts)
    assert ax.get_xlim() == (0, 60)
