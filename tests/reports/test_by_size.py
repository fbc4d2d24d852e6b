import itertools
import math
from dataclasses import replace

import pytest

from reports import palette, sheet
from reports.figures import by_size
from reports.record import Record

MIB = 2**20
BASE = Record(method="lora", budget=7, model="layer 384x1536", batch=2, seq=64, peak_step_bytes=10 * MIB)
# In the order of D_in x D_out, which is not that of D_in nor that of the text.
SIZES = ((1024, 100), (384, 1536), (768, 3072))


def of_size(size, method="lora", peak=10, **changes):
    model = f"{changes.pop('kind', 'layer')} {size[0]}x{size[1]}"
    return replace(BASE, model=model, method=method, peak_step_bytes=peak and peak * MIB, **changes)


MATRIX = [
    of_size(size, method, peak=2**index * (shift + 1))
    for index, size in reversed(list(enumerate(SIZES)))
    for shift, method in enumerate(("sparsegrad", "full", "lora"))
]


def draw(records, layout=sheet.WIDE):
    return by_size.draw(by_size.Chart.of(records), layout).figure


def marks(ax) -> dict[str, list[tuple[float, float]]]:
    """Where a method's marks stand, by the method's marker."""
    names = {palette.method_marker(name): name for name in palette.METHOD_COLOURS}
    found: dict[str, list[tuple[float, float]]] = {}
    for line in ax.lines:
        if line.get_marker() in names:
            places = [(x, y) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True) if not math.isnan(y)]
            found.setdefault(names[line.get_marker()], []).extend(places)
    return found


def test_marks_stand_at_their_peaks_in_order_of_size():
    (ax,) = draw(MATRIX).axes
    assert ax.get_yscale() == "log"
    found = marks(ax)
    assert set(found) == {"full", "lora", "sparsegrad"}
    for shift, method in enumerate(("sparsegrad", "full", "lora")):
        places = sorted(found[method])
        assert [round(x) for x, _ in places] == [0, 1, 2]
        assert [y for _, y in places] == pytest.approx([2**index * (shift + 1) for index in range(3)])
    labels = [ax.xaxis.get_major_formatter()(place).replace("\n", "") for place in range(3)]
    assert labels == ["1024x 100", "384x 1536", "768x 3072"]


def test_methods_stand_side_by_side_in_the_order_of_the_legend():
    figure = draw([of_size(SIZES[0], name) for name in reversed(palette.METHOD_COLOURS)])
    places = {name: spots[0][0] for name, spots in marks(figure.axes[0]).items()}
    assert sorted(places, key=places.get) == list(palette.METHOD_COLOURS)
    assert all(-0.5 < place < 0.5 for place in places.values())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(palette.METHOD_COLOURS)


def test_lines_join_a_method_across_sizes():
    (ax,) = draw(MATRIX).axes
    joined = [
        line for line in ax.lines if line.get_linestyle() == "-" and line.get_color() == palette.method_colour("full")
    ]
    (line,) = joined
    assert list(line.get_ydata()) == pytest.approx([2, 4, 8])


def test_line_has_a_gap_where_a_peak_is_missing():
    records = [of_size(SIZES[0]), of_size(SIZES[1], peak=None, status="oom", reason="full"), of_size(SIZES[2])]
    (ax,) = draw(records).axes
    (line,) = [
        line for line in ax.lines if line.get_color() == palette.method_colour("lora") and len(line.get_xdata()) == 3
    ]
    assert [math.isnan(y) for y in line.get_ydata()] == [False, True, False]
    (cross,) = [line for line in ax.lines if line.get_marker() == "x"]
    assert list(cross.get_xdata()) == [1]


def test_several_records_of_a_method_are_all_drawn_and_not_joined():
    records = [of_size(size, peak=peak, budget=peak) for size in SIZES for peak in (3, 5)]
    (ax,) = draw(records).axes
    assert sorted(y for _, y in marks(ax)["lora"]) == pytest.approx([3, 3, 3, 5, 5, 5])
    assert not any(
        line.get_linestyle() == "-" and line.get_color() == palette.method_colour("lora") for line in ax.lines
    )


def test_settings_are_kept_apart_and_regimes_too():
    changes = [
        {},
        {"kind": "block"},
        {"seq": 128},
        {"dtype": "bfloat16"},
        {"device_semantics": "cuda"},
    ]
    records = [
        of_size(SIZES[0], train_rest=regime, **change) for change, regime in itertools.product(changes, ("none", "all"))
    ]
    figure = draw(records)
    assert len(figure.axes) == 10
    titles = [ax.texts[0].get_text() for ax in figure.axes]
    expected = [
        "layer, 128 tokens, bfloat16",
        "layer, 128 tokens, float32",
        "layer, 128 tokens, float32, CUDA",
        "layer, 256 tokens, float32",
        "two blocks, 128 tokens, float32",
    ]
    assert titles == expected * 2
    assert {sheet.REGIMES[regime] for regime in ("all", "none")} <= {text.get_text() for text in figure.texts}
    assert all(len(marks(ax)["lora"]) == 1 for ax in figure.axes)


def test_tokens_are_what_decides_not_the_batch():
    figure = draw([of_size(SIZES[0], batch=2, seq=64), of_size(SIZES[0], batch=1, seq=128)])
    assert len(figure.axes) == 1
    assert draw([of_size(SIZES[0], batch=None)]).axes[0].texts[0].get_text().startswith("layer, — tokens")


@pytest.mark.parametrize(
    "model", ["roberta-base", "layer", "layer 3x", "layer 3x4 ", "my layer 3x4", "layer 3x4x5", "block ax4"]
)
def test_models_are_not_taken_for_layers(model):
    assert by_size.Chart.of([replace(BASE, model=model)]).regimes == {}


def test_predicted_is_hollow_and_dashed():
    records = [of_size(size, source=source) for size in SIZES for source in ("measured", "predicted")]
    figure = draw(records)
    (ax,) = figure.axes
    marked = [line for line in ax.lines if line.get_marker() == "o"]
    assert [line.get_markerfacecolor() == palette.LIGHT.background for line in marked] == [False, True]
    assert sum(line.get_linestyle() == "--" for line in ax.lines) == 1
    assert "hollow: predicted" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_measured_mark_is_seen_upon_a_prediction_that_is_the_same():
    (ax,) = draw([of_size(SIZES[0], source=source) for source in ("measured", "predicted")]).axes
    measured, predicted = (line for line in ax.lines if line.get_marker() == "o")
    assert measured.get_zorder() > predicted.get_zorder()
    assert measured.get_markersize() < predicted.get_markersize()


def test_what_is_left_out_is_counted():
    records = [of_size((number + 1, 3)) for number in range(by_size.MOST_SIZES + 2)]
    records += [of_size((1, 3), f"method {number}") for number in range(by_size.MOST_METHODS + 3)]
    chart = by_size.Chart.of([*records, replace(BASE, model="roberta")])
    # lora and the first of the others in order have their marks; four others have none.
    assert len(chart.methods) == by_size.MOST_METHODS
    assert chart.left_out == 2 + 4
    assert chart.total == len(records)


def test_panels_that_are_left_out_are_counted():
    chart = by_size.Chart.of([of_size(SIZES[0], seq=number + 1) for number in range(by_size.MOST_PANELS + 1)])
    assert len(chart.panels) == by_size.MOST_PANELS
    assert chart.left_out == 1


@pytest.mark.parametrize("peak", [None, 0, 10**60])
def test_what_has_no_place_on_the_scale_is_crossed_and_leaves_it_alone(peak):
    odd = replace(of_size(SIZES[1]), peak_step_bytes=peak)
    (ax,) = draw([of_size(SIZES[0]), odd]).axes
    assert sum(line.get_marker() == "x" for line in ax.lines) == 1
    assert 1 < ax.get_ylim()[0] < 10 < ax.get_ylim()[1] < 100
    (ax,) = draw([odd]).axes
    assert "not obtained" in [text.get_text() for text in ax.texts]


@pytest.mark.parametrize("layout", [sheet.WIDE, sheet.NARROW], ids=lambda layout: layout.name)
def test_absurd_layers_are_drawn(layout):
    records = [
        of_size((10**9 - 1, 1), method="<script>\n$\\frac{\x00"),
        of_size((1, 1), batch=10**400, seq=10**400),
        of_size((0, 0), dtype="d" * 500, peak=2**60),
    ]
    drawing = by_size.draw(by_size.Chart.of(records), layout)
    assert drawing.png()
    assert b"<script" not in drawing.svg()


def test_words_say_every_peak():
    failed = of_size(SIZES[0], "head", None, status="oom", reason="full")
    text = by_size.describe(by_size.Chart.of([*MATRIX, failed]))
    smallest = "1024x100: sparsegrad[7] 1.00, full[7] 2.00, lora[7] 3.00, head[7] not obtained (oom); 384x1536: "
    assert f"train_rest all, layer, 128 tokens, float32: {smallest}" in text
