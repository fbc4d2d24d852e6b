import base64
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from reports import page, palette, sheet, svg
from reports.figures import breakdown, counts
from reports.record import BREAKDOWN, COUNTS, Record

NAMESPACE = "{http://www.w3.org/2000/svg}"
MIB = 2**20
ONE = Record(
    method="lora",
    model="m",
    peak_step_bytes=6 * MIB,
    **dict.fromkeys(BREAKDOWN, MIB),
    **dict.fromkeys(COUNTS, 1000),
)
PREDICTED = replace(ONE, source="predicted")


def parsed(draw=breakdown.draw, *records, layout=sheet.WIDE, workload="w"):
    return ElementTree.fromstring(draw(workload, {"all": records or [ONE]}, layout).svg())


def written(body: str) -> ElementTree.Element:
    """What becomes of an SVG as matplotlib writes them."""
    source = (
        '<svg xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 36">'
        f'<defs><style type="text/css">*{{}}</style></defs><g id="figure_1">{body}</g></svg>'
    )
    return ElementTree.fromstring(svg.compact(source, 100, 50))


def style_of(root: ElementTree.Element, element: ElementTree.Element) -> dict[str, str]:
    """The declarations of the element's class."""
    rules = re.search(rf"\.{element.get('class')}{{([^}}]*)}}", root.find(f"{NAMESPACE}style").text)[1]
    return dict(rule.split(":", 1) for rule in rules.split(";"))


@pytest.mark.parametrize("layout", [sheet.WIDE, sheet.NARROW], ids=lambda layout: layout.name)
def test_is_as_large_as_its_sheet(layout):
    drawing = breakdown.draw("w", {"all": [ONE]}, layout)
    root = ElementTree.fromstring(drawing.svg())
    assert (root.get("width"), root.get("height")) == (str(layout.width), str(round(drawing.height)))
    _, _, width, height = map(float, root.get("viewBox").split())
    assert width / height == pytest.approx(layout.width / drawing.height, rel=1e-3)


def test_bars_are_as_long_as_in_the_figure():
    drawing = breakdown.draw("w", {"all": [ONE]})
    root = ElementTree.fromstring(drawing.svg())
    (ax,) = drawing.figure.axes
    box = ax.get_window_extent()
    for name, patch in zip(BREAKDOWN, ax.patches, strict=True):
        start, end = (
            box.x0 + box.width * x / ax.get_xlim()[1] for x in (patch.get_x(), patch.get_x() + patch.get_width())
        )
        (bar, _) = [  # the other is the legend's
            path
            for path in root.iter(f"{NAMESPACE}path")
            if style_of(root, path).get("fill") == palette.CATEGORY_COLOURS[name]
        ]
        left, right = re.match(r"M([\d.]+) [\d.]+H([\d.]+)", bar.get("d")).groups()
        scale = 72 / drawing.figure.dpi
        assert (float(left), float(right)) == pytest.approx((start * scale, end * scale), abs=0.1)


def test_neutral_colours_follow_the_reader_and_others_do_not():
    root = parsed(breakdown.draw, ONE, PREDICTED)
    style = root.find(f"{NAMESPACE}style").text
    light, dark = re.findall(r":root{([^}]*)}", style)
    for theme, block in ((palette.LIGHT, light), (palette.DARK, dark)):
        for role in svg.ROLES:
            assert f"--{role}:{getattr(theme, role)}" in block.split(";")
    assert style.index("prefers-color-scheme:dark") < style.index(dark)
    rules = style[style.index(dark) + len(dark) :]
    assert not any(getattr(palette.LIGHT, role) in rules for role in svg.ROLES)
    assert all(colour in rules for colour in palette.CATEGORY_COLOURS.values())
    assert palette.INK in rules  # hatching upon colours that stay as they are
    ground = next(root.iter(f"{NAMESPACE}path"))
    assert style_of(root, ground)["fill"] == "var(--background)"


def test_text_is_text():
    said = [element.text for element in parsed().iter(f"{NAMESPACE}text")]
    assert f"{breakdown.TITLE}: w" in said
    assert "6.00 MiB" in said
    assert "font-family" in parsed().find(f"{NAMESPACE}style").text


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>",
        "\"'><img src=x onerror=alert(1)>",
        "</text></svg>",
        "&amp; &lt;",
        "]]> --> <!--",
        "$x^2$ $\\frac{",
        '#ffffff url(#i0) style="fill: #1b1f24"',
    ],
)
def test_names_are_only_text(name):
    plain = [element.tag for element in parsed(breakdown.draw, replace(ONE, method="x")).iter()]
    root = parsed(breakdown.draw, replace(ONE, method=name))
    assert [element.tag for element in root.iter()] == plain
    assert name in [element.text for element in root.iter(f"{NAMESPACE}text")]


@pytest.mark.parametrize("char", ["\0", "\x01", "\x1b", "\n", "\t", "\ud800", "\ufffe", "\u202e", "\x7f", "\u2028"])
def test_characters_that_no_font_draws_are_left_out(char):
    root = parsed(breakdown.draw, replace(ONE, method=f"a{char}b"), workload=f"w{char}x")
    said = [element.text for element in root.iter(f"{NAMESPACE}text")]
    assert "a b" in said
    assert f"{breakdown.TITLE}: w x" in said


def test_everything_referred_to_is_there_once():
    for drawing in (parsed(breakdown.draw, PREDICTED), parsed(counts.draw, ONE, PREDICTED)):
        ids = [element.get("id") for element in drawing.iter() if element.get("id")]
        assert len(ids) == len(set(ids))
        source = ElementTree.tostring(drawing, encoding="unicode")
        used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', source))
        assert {one or other for one, other in used} == set(ids)


def test_nothing_comes_from_elsewhere_and_nothing_runs():
    source = breakdown.draw("w", {"all": [ONE, PREDICTED]}).svg().decode()
    assert set(re.findall(r"https?://[^\"'\s<>]+", source)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<script|<image|<foreignObject|\son\w+=|@import", source)


def test_is_much_smaller_than_matplotlib_s(monkeypatch):
    drawing = counts.draw("w", {"all": [replace(ONE, budget=number) for number in range(20)]})
    compact = len(drawing.svg())
    monkeypatch.setattr(svg, "compact", lambda source, *_: source)
    assert compact < 0.3 * len(drawing.svg())


def test_level_and_upright_lines_are_short_and_curves_stay():
    root = written('<path d="M 0 0.04 \nL 10.26 0 \nL 10.26 0.01 \nL 10.3 5.58 \nL 4 7 \nz\n" style="fill: #123456"/>')
    assert root.find(f"{NAMESPACE}path").get("d") == "M0 0H10.3V5.6L4 7z"
    root = written('<path d="M 0 1.5 \nC 0.397805 1.5 0.77937 1.341951 1.06066 1.06066 \nz\n"/>')
    assert root.find(f"{NAMESPACE}path").get("d") == "M0 1.5C0.4 1.5 0.78 1.34 1.06 1.06z"


def test_rotated_text_stays_rotated():
    root = written(
        '<text x="1.04" y="2" transform="rotate(-90 1 2)">up</text>'
        '<text x="1" y="2" transform="rotate(-0 1 2)">level</text>'
    )
    up, level = root.findall(f"{NAMESPACE}text")
    assert up.get("transform") == "rotate(-90 1 2)"
    assert up.get("x") == "1"
    assert level.get("transform") is None


def test_groups_that_say_something_stay():
    root = written(
        '<g id="text_1"><g clip-path="url(#p12)"><path d="M 0 0"/></g></g>'
        '<defs><clipPath id="p12"><rect x="0" y="0" width="1" height="2"/></clipPath></defs>'
    )
    (group,) = root.findall(f"{NAMESPACE}g")
    assert group.get("clip-path") == "url(#i0)"
    assert root.find(f"{NAMESPACE}defs/{NAMESPACE}clipPath").get("id") == "i0"


def test_ground_of_a_hatch_is_themed():
    root = written(
        '<path d="M 0 0" style="fill: url(#h1)"/><defs><pattern id="h1" width="72" height="72">'
        '<rect x="0" y="0" width="73" height="73" fill="#ffffff"/></pattern></defs>'
    )
    rect = root.find(f".//{NAMESPACE}rect")
    assert rect.get("fill") is None
    assert style_of(root, rect)["fill"] == "var(--background)"
    assert style_of(root, root.find(f"{NAMESPACE}path"))["fill"] == "url(#i0)"


def test_page_embeds_what_is_drawn(tmp_path):
    source = page.write_report([ONE], tmp_path).read_text(encoding="utf-8")
    embedded = base64.b64decode(re.search(r"data:image/svg\+xml;base64,([^\"]+)", source)[1])
    # The breakdown comes first, wide before narrow.
    title = "m, batch —, seq —, float32"
    assert embedded == breakdown.draw(title, {"all": [ONE]}, sheet.WIDE).svg()
