import io
import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from PIL import Image

from reports import page, palette, sheet
from reports.figures import breakdown, counts, panels
from reports.record import BREAKDOWN, COUNTS, STATUSES, Record
from reports.timeline import Timeline

MIB = 2**20
# Six different sizes, so that no two categories can be swapped unseen; they sum to 210 MiB.
SIZES = dict(zip(BREAKDOWN, (60 * MIB, 50 * MIB, 40 * MIB, 30 * MIB, 20 * MIB, 10 * MIB), strict=True))
ONE = Record(method="lora", budget=7, model="m", peak_step_bytes=sum(SIZES.values()), **SIZES)
EMPTY = Record(method="lora", model="m")
COUNTED = replace(
    ONE,
    **{name: 10 ** (3 + index) for index, name in enumerate(COUNTS)},
    peak_reserved_bytes=300 * MIB,
    peak_preparation_bytes=250 * MIB,
    step_time_s=0.2,
    step_time_ratio=0.5,
    step_time_ratio_low=0.4,
    step_time_ratio_high=0.6,
    timeline=Timeline(
        (("forward", 0), ("backward", 2), ("optimizer", 5), ("zero_grad", 6)),
        tuple(range(8)),
        {name: tuple(size // 8 * n for n in (1, 3, 5, 8, 7, 5, 2, 1)) for name, size in SIZES.items()},
    ).dumps(),
)
METHODS = [
    ("full", None),
    ("head", None),
    ("lora", 7),
    ("meprop-example", 0.01),
    ("meprop-unified", 328),
    ("random-mask", 0.01),
    ("sparsegrad-core", "82x326"),
]
REALISTIC = {
    regime: [replace(COUNTED, method=method, budget=budget, train_rest=regime) for method, budget in METHODS]
    + [replace(COUNTED, source="predicted", status="diverged", reason="loss", train_rest=regime)]
    + [replace(EMPTY, method="sparsegrad", budget=0.01, status="oom", reason="out of memory " * 20, train_rest=regime)]
    for regime in ("all", "none")
}
LAYOUTS = [sheet.WIDE, sheet.NARROW]
THEMES = [palette.LIGHT, palette.DARK]
KINDS = [*page.KINDS, page.FIT]
DRAW = [kind.draw for kind in KINDS]
NAMES = [kind.stem for kind in KINDS]


def pixels(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB")


def rgb(colour: str) -> tuple[int, int, int]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def widths(image: Image.Image) -> dict[str, int]:
    """How many pixels of each category the bar has on its middle row: that with most coloured pixels."""
    colours = {name: rgb(colour) for name, colour in palette.CATEGORY_COLOURS.items()}
    rows = []
    beside = round(40 * sheet.DENSITY)  # the y label
    for y in range(0, image.height, 3):
        row = [image.getpixel((x, y)) for x in range(beside, image.width)]
        rows.append({name: sum(near(pixel, colour) for pixel in row) for name, colour in colours.items()})
    return max(rows, key=lambda row: sum(row.values()))


def near(pixel: tuple[int, ...], colour: tuple[int, ...]) -> bool:
    """Whether they are the same but for what the PNG's palette rounds off."""
    return max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) <= 2


def drawn_figure(draw, groups, layout=sheet.WIDE):
    return draw("w", groups, layout).figure


def texts(figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts] + [text.get_text() for text in figure.texts]


def test_bar_lengths_are_proportional_to_bytes():
    bar = widths(pixels(breakdown.draw("w", {"all": [ONE]}).png()))
    total = sum(bar.values())
    for name, size in SIZES.items():
        # Each segment loses a pixel or two to the outlines at its ends.
        assert bar[name] == pytest.approx(total * size / ONE.peak_step_bytes, abs=3)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("draw", DRAW, ids=NAMES)
def test_image_is_a_png_as_large_as_its_sheet(draw, layout):
    drawing = draw("w", {"all": [COUNTED, EMPTY]}, layout)
    png = drawing.png()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert pixels(png).width == pytest.approx(layout.width * sheet.DENSITY, abs=1)
    assert pixels(png).height == pytest.approx(drawing.height * sheet.DENSITY, abs=1)
    assert near(pixels(png).getpixel((0, 0)), rgb(palette.LIGHT.background))


@pytest.mark.parametrize("draw", DRAW, ids=NAMES)
def test_same_records_give_the_same_bytes(draw):
    first, second = (draw("w", {"all": [COUNTED, replace(COUNTED, source="predicted")]}) for _ in range(2))
    assert first.png() == second.png()
    assert first.svg() == second.svg()


@pytest.mark.parametrize("draw", DRAW[:-1], ids=NAMES[:-1])
def test_predicted_looks_different_from_measured(draw):
    # Without legend and text, so that the marks themselves must differ.
    marks = []
    for source in ("measured", "predicted"):
        (ax,) = drawn_figure(draw, {"all": [replace(COUNTED, source=source)]}).axes
        looks = [(patch.get_hatch(), patch.get_facecolor()) for patch in ax.patches]
        marks.append(looks + [line.get_markerfacecolor() for line in ax.lines])
    assert marks[0] != marks[1]


def test_predicted_bars_are_hatched_and_measured_ones_are_not():
    for source, hatched in (("measured", False), ("predicted", True)):
        figure = drawn_figure(breakdown.draw, {"all": [replace(ONE, source=source)]})
        (ax,) = figure.axes
        assert len(ax.patches) == len(BREAKDOWN)
        assert all(bool(patch.get_hatch()) is hatched for patch in ax.patches)
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert ("hatched: predicted" in labels) is hatched


def test_segments_end_where_the_total_is():
    (ax,) = drawn_figure(breakdown.draw, {"all": [ONE]}).axes
    ends = [patch.get_x() + patch.get_width() for patch in ax.patches]
    assert ends[-1] == pytest.approx(ONE.peak_step_bytes / MIB)
    assert [patch.get_x() for patch in ax.patches[1:]] == pytest.approx(ends[:-1])


def test_total_is_printed():
    assert "210.00 MiB" in texts(drawn_figure(breakdown.draw, {"all": [ONE]}))


def test_missing_bar_says_so_and_has_no_length():
    failed = replace(EMPTY, status="oom", reason="card full")
    figure = drawn_figure(breakdown.draw, {"all": [failed]})
    assert figure.axes[0].patches[:] == []
    assert "not obtained (oom: card full)" in texts(figure)
    assert "0" not in texts(figure)


def test_zero_is_not_missing():
    found = texts(drawn_figure(breakdown.draw, {"all": [replace(EMPTY, peak_step_bytes=0)]}))
    assert "0 MiB" in found
    assert not any(panels.NOT_OBTAINED in text for text in found)


def test_what_categories_do_not_explain_is_drawn_apart():
    partial = replace(ONE, temporary_bytes=None)
    figure = drawn_figure(breakdown.draw, {"all": [partial]})
    assert figure.axes[0].patches[-1].get_width() == pytest.approx(SIZES["temporary_bytes"] / MIB)
    assert figure.legends[0].get_texts()[-1].get_text() == "category not obtained"


def test_categories_without_a_total():
    assert "total not obtained" in texts(drawn_figure(breakdown.draw, {"all": [replace(ONE, peak_step_bytes=None)]}))


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_regimes_share_one_scale(kind):
    few = Timeline((("forward", 0),), (0,), dict.fromkeys(BREAKDOWN, (1,))).dumps()
    small = replace(COUNTED, **{name: 1 for name in (*COUNTS, *BREAKDOWN)}, peak_step_bytes=6, timeline=few)
    first, second = drawn_figure(kind.draw, {"all": [COUNTED], "none": [replace(small, step_time_ratio=9.0)]}).axes
    if kind.stem == "timeline":
        assert first.get_ylim() == second.get_ylim()
    else:
        assert first.get_xlim() == second.get_xlim()


def test_counts_stand_at_their_values():
    (ax,) = drawn_figure(counts.draw, {"all": [COUNTED]}).axes
    assert ax.get_xscale() == "log"
    assert [line.get_xdata()[0] for line in ax.lines] == [getattr(COUNTED, name) for name in COUNTS]
    low, high = ax.get_xlim()
    assert all(low < getattr(COUNTED, name) < high for name in COUNTS)
    # All lanes are different, in the order of the schema from the top.
    lanes = [line.get_ydata()[0] for line in ax.lines]
    assert lanes == sorted(set(lanes))


def test_missing_count_says_so_and_zero_says_zero():
    figure = drawn_figure(counts.draw, {"all": [replace(COUNTED, touched_params=None, updated_params=0)]})
    assert len(figure.axes[0].lines) == len(COUNTS) - 2
    assert texts(figure).count("not obtained") == 1
    assert sum(text.startswith("0 ") for text in texts(figure)) == 1


def test_predicted_markers_are_hollow():
    (ax,) = drawn_figure(counts.draw, {"all": [replace(COUNTED, source="predicted")]}).axes
    assert {line.get_markerfacecolor() for line in ax.lines} == {palette.LIGHT.background}


@pytest.mark.parametrize("draw", DRAW, ids=NAMES)
def test_title_axes_and_legend_are_labelled(draw):
    figure = drawn_figure(draw, REALISTIC)
    assert any(text.get_text().endswith(": w") for text in figure.texts)
    assert {sheet.REGIMES[regime] for regime in REALISTIC} <= {text.get_text() for text in figure.texts}
    for ax in figure.axes:
        assert ax.get_xlabel()
    labels = [ax.get_xlabel() + ax.get_ylabel() for ax in figure.axes]
    assert any(unit in label for unit in ("MiB", "GiB", "entries", "full's") for label in labels)
    assert len(figure.legends[0].get_texts()) >= 3


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("panels", [REALISTIC, {"all": [EMPTY]}], ids=["realistic", "one empty record"])
@pytest.mark.parametrize("draw", DRAW, ids=NAMES)
def test_no_text_overlaps_another_or_leaves_the_image(draw, panels, layout):
    figure = drawn_figure(draw, panels, layout)
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in figure.texts]
    for ax in figure.axes:
        labels = [*ax.texts, ax.xaxis.label, ax.yaxis.label]
        for axis, (low, high) in ((ax.xaxis, sorted(ax.get_xlim())), (ax.yaxis, sorted(ax.get_ylim()))):
            ticks = axis.get_major_ticks()
            labels += [t.label1 for t in ticks if low <= t.get_loc() <= high and t.label1.get_visible()]
        boxes += [(text.get_text(), text.get_window_extent()) for text in labels if text.get_text()]
    boxes += [(text.get_text(), text.get_window_extent()) for text in figure.legends[0].get_texts()]
    outer = figure.bbox
    for name, box in boxes:
        assert outer.x0 <= box.x0, name
        assert box.x1 <= outer.x1, name
        assert outer.y0 <= box.y0, name
        assert box.y1 <= outer.y1, name
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        # Boxes hold a font's full height, so that lines one above the other may touch by a pixel.
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        down = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 1 or down <= 2, (one, other)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("longest", [1, 20, 26, 40])
def test_a_long_legend_stays_within_the_image(layout, longest):
    labels = ["x" * (1 + number % longest) for number in range(30)]
    sheet_ = sheet.Sheet("t", [sheet.legend_marker("o", label, "#000000") for label in labels], layout)
    sheet_.add_grid({"": 1}, sheet.Grid(columns=1, height=50, left=20, above=5, below=30))
    figure = sheet_.figure
    figure.draw_without_rendering()
    (heading,) = [text for text in figure.texts if text.get_text() == ""]
    for text in figure.legends[0].get_texts():
        box = text.get_window_extent()
        assert box.x1 <= figure.bbox.x1, text.get_text()
        assert box.y0 >= heading.get_window_extent().y1


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("draw", DRAW, ids=NAMES)
def test_every_status_is_drawn(draw, status):
    one = replace(COUNTED, status=status, reason="why")
    drawing = draw("w", {"all": [one, replace(EMPTY, status=status)]}, sheet.NARROW)
    assert b"</svg>" in drawing.svg()
    said = texts(drawing.figure)
    assert status == "ok" or any(status in text for text in said)
    assert any(panels.NOT_OBTAINED in text for text in said)


@pytest.mark.parametrize(
    "one",
    [
        replace(COUNTED, method="$\\frac{", model="x"),
        replace(COUNTED, method="two\nlines\t\x00"),
        replace(COUNTED, method="half \ud800 pair"),
        replace(COUNTED, method="x" * 5000),
        replace(COUNTED, budget=10**60),
        replace(COUNTED, peak_step_bytes=10**400, trainable_params=10**400),
        replace(COUNTED, **{name: 10**400 for name in (*COUNTS, *BREAKDOWN)}),
        replace(COUNTED, step_time_ratio=1e308, step_time_ratio_low=0.0, step_time_s=5e-324),
        replace(COUNTED, step_time_ratio=0.0, step_time_ratio_high=None),
        replace(COUNTED, step_time_ratio_low=0.0, step_time_ratio_high=1e308),
        replace(COUNTED, timeline=Timeline((("a\nb", 0),), (0,), dict.fromkeys(BREAKDOWN, (10**40,))).dumps()),
        replace(COUNTED, timeline=Timeline((("$x^2$", 0),) * 60, (0, 9), dict.fromkeys(BREAKDOWN, (0, 0))).dumps()),
        replace(COUNTED, **{name: 1 for name in COUNTS}),
        replace(COUNTED, status="oom", reason="$\\bad{ <b>\n" * 500, peak_step_bytes=None),
    ],
)
@pytest.mark.parametrize("draw", DRAW, ids=NAMES)
def test_absurd_records_are_drawn(draw, one):
    drawing = draw(one.method, {"all": [one], "none": [one, EMPTY]}, sheet.NARROW)
    assert drawing.png().startswith(b"\x89PNG")
    assert ElementTree.fromstring(drawing.svg()).tag.endswith("svg")


def test_value_past_every_machine_is_printed_and_leaves_the_scale_alone():
    huge = replace(ONE, peak_step_bytes=10**400)
    (ax,) = drawn_figure(breakdown.draw, {"all": [ONE, huge]}).axes
    assert ax.get_xlim()[1] < 2 * ONE.peak_step_bytes / MIB
    assert panels.TOO_LARGE in [text.get_text() for text in ax.texts]


def test_drawn_stops_at_the_most_a_panel_holds():
    records = [replace(ONE, seed=seed) for seed in range(5)]
    assert panels.drawn({"all": records, "none": [ONE]}, 3) == {"all": records[:3], "none": [ONE]}


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_figures_draw_as_many_records_as_they_say(kind):
    records = [replace(EMPTY, budget=number) for number in range(kind.most + 1)]
    drawing = kind.draw("w", {"all": records}, sheet.NARROW)
    named = [text for text in texts(drawing.figure) if text.startswith("lora[")]
    assert named == [record.label for record in records[: kind.most]]
    assert kind.describe("w", {"all": records}).count("lora[") == kind.most


def test_records_that_share_a_label_are_told_apart():
    found = texts(drawn_figure(breakdown.draw, {"all": [ONE, replace(ONE, attention="sdpa")]}))
    assert "lora[7] · attention —" in found
    assert "lora[7] · attention sdpa" in found


def test_breakdown_alt_says_what_the_bars_show():
    alt = breakdown.describe("roberta", {"all": [ONE], "none": [replace(EMPTY, status="oom", reason="full card")]})
    assert "roberta" in alt
    assert "lora[7] 210.00 MiB" in alt
    for name, size in SIZES.items():
        assert f"{name.removesuffix('_bytes')} {size // MIB}.00" in alt
    assert "train_rest none: lora not obtained (oom: full card)" in alt


def test_counts_alt_says_what_the_markers_show():
    alt = counts.describe("roberta", {"all": [replace(COUNTED, touched_params=None, state_params=0)]})
    assert "trainable 1,000" in alt
    assert "touched not obtained" in alt
    assert "state 0" in alt


def test_drawing_leaves_pyplot_alone():
    code = (
        "import sys\nfrom reports.figures import breakdown\nfrom reports.record import Record\n"
        "breakdown.draw('w', {'all': [Record(method='lora', model='m', peak_step_bytes=1)]}).svg()\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def linear(colour: str) -> list[float]:
    parts = [part / 255 for part in rgb(colour)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def lab(light: list[float]) -> list[float]:
    """CIE L*a*b* of linear sRGB under D65."""
    matrix = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    white = (0.9505, 1.0, 1.089)
    clipped = [min(max(part, 0), 1) for part in light]
    xyz = [sum(a * b for a, b in zip(row, clipped, strict=True)) / w for row, w in zip(matrix, white, strict=True)]
    x, y, z = (part ** (1 / 3) if part > 0.008856 else 7.787 * part + 16 / 116 for part in xyz)
    return [116 * y - 16, 500 * (x - y), 200 * (y - z)]


# Machado, Oliveira and Fernandes (2009), "A Physiologically-based Model for Simulation of Color Vision Deficiency",
# matrices of severity 1.0, on linear RGB.
VISION = {
    "trichromacy": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}
# A difference of 2.3 is just noticeable side by side; small marks apart from one another need several times that.
LEAST_DIFFERENCE = 6 * 2.3


@pytest.mark.parametrize("colours", [palette.METHOD_COLOURS, palette.CATEGORY_COLOURS], ids=["methods", "categories"])
@pytest.mark.parametrize("vision", VISION.values(), ids=VISION.keys())
def test_colours_stay_apart_for_colour_blind_readers(vision, colours):
    seen = {
        name: lab([sum(a * b for a, b in zip(row, linear(colour), strict=True)) for row in vision])
        for name, colour in colours.items()
    }
    for (one, a), (other, b) in itertools.combinations(seen.items(), 2):
        assert math.dist(a, b) >= LEAST_DIFFERENCE, (one, other)


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
@pytest.mark.parametrize("role", ["foreground", "muted", "accent"])
def test_text_has_the_contrast_that_wcag_asks(theme, role):
    def luminance(colour):
        return sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear(colour), strict=True))

    for behind in (theme.background, theme.surface):
        dark, light = sorted((luminance(getattr(theme, role)), luminance(behind)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_methods_have_markers_of_their_own():
    assert set(palette.METHOD_MARKERS) == set(palette.METHOD_COLOURS)
    assert len(set(palette.METHOD_MARKERS.values())) == len(palette.METHOD_MARKERS)
    assert palette.method_marker("peft:some") not in palette.METHOD_MARKERS.values()
    assert palette.by_name("full") < palette.by_name("sparsegrad") < palette.by_name("a method of my own")


def test_every_category_has_a_colour():
    assert set(palette.CATEGORY_COLOURS) == set(BREAKDOWN)


def test_colour_of_an_unlisted_method_is_the_same_in_every_process():
    code = "from reports.palette import method_colour; print(method_colour('peft:some'), method_colour('\\ud800'))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    (output,) = outputs
    assert all(len(colour) == 7 and int(colour[1:], 16) >= 0 for colour in output.split())
    assert palette.method_colour("peft:some") == output.split()[0]
    assert palette.method_colour("peft:some") != palette.method_colour("peft:other")
