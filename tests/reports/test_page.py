import base64
import itertools
import re
from dataclasses import fields, replace
from html.parser import HTMLParser

import pytest

from reports import page, sheet, tables
from reports.figures import by_size, panels, timeline
from reports.record import BREAKDOWN, STATUSES, Record, from_csv, meaning
from reports.timeline import Timeline

MIB = 2**20
LORA = Record(
    method="lora",
    budget=7,
    model="layer 7x13",
    matched=True,
    batch=1,
    seq=17,
    resident_bytes=10 * MIB,
    peak_step_bytes=30 * MIB,
    step_time_s=0.25,
    torch_version="2.11.0",
    device_name="some processor",
    threads=3,
    commit="abc123-dirty",
)
FULL = replace(LORA, method="full", budget=None, matched=False, peak_step_bytes=60 * MIB)
CUDA = replace(
    LORA,
    model="llama",
    source="predicted",
    device="cuda",
    device_semantics="cuda",
    gpu="a100",
    peak_reserved_bytes=2**34,
    peak_preparation_bytes=2**30,
    step_time_s=None,
)
HOSTILE = "<script>alert(1)</script>\"'&</td>{{ 7 * 7 }}"
VOID = {"meta", "img", "br", "source", "link", "input", "hr"}


class Document(HTMLParser):
    """The page's elements, each with its attributes and the text in it; fails on tags that do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, texts in self.open:
            texts.append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attrs, "".join(texts).strip()) for name, attrs, texts in self.elements if name == tag]

    @property
    def text(self) -> str:
        return self.all("body")[0][1]


@pytest.fixture
def quick_figures(monkeypatch):
    """Stands in for drawing where a test is about the page: drawing has tests of its own."""

    class Blank(sheet.Sheet):
        def __init__(self, *_):
            self.height = 1.0

        def png(self):
            return b"\x89PNG"

        def svg(self):
            return b"<svg/>"

    kinds = tuple(replace(kind, draw=Blank) for kind in page.KINDS)
    monkeypatch.setattr(page, "KINDS", kinds)
    monkeypatch.setattr(page, "FIT", replace(page.FIT, draw=Blank))
    monkeypatch.setattr(by_size, "draw", Blank)


def written(records, tmp_path) -> Document:
    return Document(page.write_report(records, tmp_path).read_text(encoding="utf-8"))


def test_writes_page_csv_and_figures(tmp_path):
    records = [LORA, FULL, replace(LORA, train_rest="none"), replace(LORA, dtype="bfloat16")]
    path = page.write_report(records, tmp_path / "new" / "out")
    assert path == tmp_path / "new" / "out" / "index.html"
    images = [f"{kind.stem}-{number}.png" for kind in page.KINDS for number in (1, 2)]
    images.append("peak-by-size.png")
    assert sorted(entry.name for entry in path.parent.iterdir()) == sorted(["index.html", "records.csv", *images])
    stems = [kind.stem for kind in page.KINDS]
    assert stems == ["breakdown", "timeline", "step-time", "counts"]
    for name in images:
        assert (path.parent / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert from_csv((path.parent / "records.csv").read_text(encoding="utf-8")) == records


def test_page_needs_nothing_else(tmp_path):
    document = written([LORA], tmp_path)
    assert not document.all("link")
    for _, attrs, _ in document.elements:
        for name in ("src", "srcset", "href", "action"):
            assert (attrs.get(name) or "#").startswith(("data:image/svg+xml;base64,", "#")), attrs
    source = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest", source)


def test_embedded_figures_are_those_drawn_and_have_a_text_twin(tmp_path):
    document = written([LORA, FULL], tmp_path)
    images = [attrs for attrs, _ in document.all("img")]
    assert [attrs["class"] for attrs in images] == ["wide", "narrow"] * (1 + len(page.KINDS))
    decoded = [base64.b64decode(attrs["src"].split(",", 1)[1]) for attrs in images]
    title, panels_ = tables.Workload.of(LORA).title, {"all": [LORA, FULL]}
    chart = by_size.Chart.of([LORA, FULL])
    sheets = [by_size.draw(chart, layout) for layout in (sheet.WIDE, sheet.NARROW)]
    sheets += [kind.draw(title, panels_, layout) for kind in page.KINDS for layout in (sheet.WIDE, sheet.NARROW)]
    assert decoded == [drawing.svg() for drawing in sheets]
    words = [by_size.describe(chart), *(kind.describe(title, panels_) for kind in page.KINDS)]
    assert [attrs["alt"] for attrs in images] == [text for text in words for _ in range(2)]
    sizes = [(int(attrs["width"]), int(attrs["height"])) for attrs in images]
    assert sizes == [(drawing.layout.width, round(drawing.height)) for drawing in sheets]
    captions = [text for _, text in document.all("figcaption")]
    assert captions == [page.BY_SIZE_CAPTION, *(kind.caption for kind in page.KINDS)]


@pytest.mark.usefixtures("quick_figures")
def test_figure_by_size_only_where_there_are_layers(tmp_path):
    document = written([replace(LORA, model="roberta")], tmp_path)
    assert len(document.all("figure")) == len(page.KINDS)
    assert not (tmp_path / "peak-by-size.png").exists()


@pytest.mark.usefixtures("quick_figures")
def test_figure_of_times_only_where_there_are_times(tmp_path):
    untimed = replace(LORA, model="roberta", step_time_s=None)
    written([LORA, replace(FULL, step_time_s=None), untimed], tmp_path)
    assert (tmp_path / "step-time-1.png").exists()
    assert not (tmp_path / "step-time-2.png").exists()
    assert (tmp_path / "counts-2.png").exists()


def test_what_fits_is_a_figure_a_caption_and_a_table(tmp_path):
    refused = replace(CUDA, method="sparsegrad", status="refused", reason="why")
    regimes = {"all": [CUDA, refused], "none": [replace(CUDA, train_rest="none")]}
    document = written([LORA, *regimes["all"], *regimes["none"]], tmp_path)
    assert (tmp_path / "fit-2.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "fit-1.png").exists()
    title = "llama, batch 1, seq 17, float32, CUDA"
    assert {attrs.get("id"): text for attrs, text in document.all("h3")}["fit-2"] == title
    assert title in [text for attrs, text in document.all("a") if attrs["href"] == "#workload-2"]
    images = [attrs for attrs, _ in document.all("img") if attrs["alt"] == page.FIT.describe(title, regimes)]
    assert [base64.b64decode(attrs["src"].split(",", 1)[1]) for attrs in images] == [
        page.FIT.draw(title, regimes, layout).svg() for layout in (sheet.WIDE, sheet.NARROW)
    ]
    (caption,) = [text for _, text in document.all("figcaption") if text.startswith("What a card must have")]
    assert "512 MiB for the CUDA context, an assumption" in caption
    assert caption.endswith("was not obtained. Predicted for the kernels of a100 (attention: none).")
    # The table that the figure stands on, with an outcome for each size of card.
    regions = [attrs["aria-labelledby"] for attrs, _ in document.all("div") if attrs.get("role") == "region"]
    assert [name for name in regions if name.startswith("fit")] == ["fit-2-all", "fit-2-none"]
    words = [text for attrs, text in document.all("td") if text in ("fits", "tight", "does not fit", "refused")]
    # 16.5 GiB are held, and next to nothing is allocated.
    assert words == [*["tight", "fits", "fits", "fits"], *["refused"] * 4, *["tight", "fits", "fits", "fits"]]


@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize(
    "records",
    [[LORA, FULL], [replace(CUDA, source="measured")], [replace(CUDA, model="block 7x13")]],
    ids=["cpu", "measured", "block"],
)
def test_nothing_asks_what_fits_without_a_prediction_for_cuda(records, tmp_path):
    document = written(records, tmp_path)
    assert "Does it fit" not in [text for _, text in document.all("h2")]
    assert list(tmp_path.glob("fit-*")) == []


@pytest.mark.usefixtures("quick_figures")
def test_prediction_stands_beside_measurement(tmp_path):
    predicted = replace(LORA, source="predicted", resident_bytes=11 * MIB)
    document = written([FULL, LORA, predicted], tmp_path)
    assert "Prediction beside measurement" in [text for _, text in document.all("h2")]
    assert "1 pair of a measurement and a prediction, 1 figure: 0 agree to the byte." in document.text
    assert "1.00 MiB, or 10.00\u00a0%, above the 10.00 MiB measured" in document.text
    ((_, table),) = [found for found in document.all("table") if "bytes compared" in found[1]]
    assert table.split()[-6:] == ["lora[7]", "resident", "10.00", "11.00", "1.00", "10.00"]
    assert "measured on: some processor" in [text for _, text in document.all("li")]


@pytest.mark.usefixtures("quick_figures")
def test_no_section_without_a_pair(tmp_path):
    document = written([LORA, replace(FULL, source="predicted"), CUDA], tmp_path)
    assert "Prediction beside measurement" not in [text for _, text in document.all("h2")]


@pytest.mark.usefixtures("quick_figures")
def test_bytes_of_cuda_and_of_the_cpu_stand_in_no_ratio_and_on_no_axis(tmp_path):
    cuda = replace(CUDA, model=FULL.model, source="measured")
    document = written([FULL, replace(cuda, peak_step_bytes=30 * MIB)], tmp_path)
    assert "Workloads marked CUDA" in document.text
    bars = [attrs["style"] for attrs, _ in document.all("span") if attrs.get("style", "").startswith("width")]
    # Each is the largest of its own row.
    assert [bar.split(";")[0] for bar in bars] == ["width: 100.0%"] * 2
    assert [text for attrs, text in document.all("h2") if attrs["id"].startswith("workload")] == [
        "layer 7x13, batch 1, seq 17, float32",
        "layer 7x13, batch 1, seq 17, float32, CUDA",
    ]


@pytest.mark.usefixtures("quick_figures")
def test_overview_shows_each_workload_and_method_with_a_link(tmp_path):
    other = replace(LORA, model="other", peak_step_bytes=None, status="oom", reason="full", source="predicted")
    document = written([LORA, FULL, replace(LORA, train_rest="none", step_time_ratio=0.5), other], tmp_path)
    (overview,) = [index for index, (_, attrs, _) in enumerate(document.elements) if attrs.get("class") == "overview"]
    inside = document.elements[overview:]
    links = [attrs["href"] for tag, attrs, _ in inside if tag == "a" and attrs.get("class") == "workload"]
    assert links == ["#workload-1", "#workload-1", "#workload-2"]
    cells = ["".join(texts).split() for tag, attrs, texts in inside if tag == "div" and attrs.get("class") == "entry"]
    assert cells == [
        ["60.00", "peak/LoRA", "2.00", "time/full", "—"],
        ["30.00", "[7]", "peak/LoRA", "1.00", "time/full", "—"],
        ["30.00", "[7]", "peak/LoRA", "1.00", "time/full", "0.50"],
        ["—", "[7]", "oom", "predicted", "peak/LoRA", "—", "time/full", "—"],
    ]
    bars = [attrs["style"] for tag, attrs, _ in inside if tag == "span" and attrs.get("style", "").startswith("width")]
    assert [bar.split(";")[0] for bar in bars] == ["width: 100.0%", "width: 50.0%", "width: 100.0%"]
    # Rows that have several records in a cell have no one value to sort by.
    assert not any("aria-sort" in attrs for tag, attrs, _ in inside[: [t for t, _, _ in inside].index("tbody")])


@pytest.mark.usefixtures("quick_figures")
def test_overview_of_many_methods_has_one_below_the_other(tmp_path):
    names = [f"method {number:02}" for number in range(14)]
    records = [replace(LORA, method=name, peak_step_bytes=(i + 1) * 2**20) for i, name in enumerate(names)]
    records += [replace(record, train_rest="none", peak_step_bytes=2 * record.peak_step_bytes) for record in records]
    document = written(records, tmp_path)
    (at,) = [i for i, (_, attrs, _) in enumerate(document.elements) if attrs.get("class") == "overview upright"]
    inside = document.elements[at:]
    inside = inside[: [tag for tag, _, _ in inside].index("h2")]
    heads = [(attrs["scope"], " ".join("".join(texts).split())) for tag, attrs, texts in inside if tag == "th"]
    assert [text for scope, text in heads if scope == "row"] == names
    assert [text.split()[-1] for scope, text in heads if scope == "col"] == ["method", "all", "none"]
    cells = ["".join(texts).split()[0] for tag, attrs, texts in inside if tag == "div"]
    assert cells == [f"{value}.00" for i in range(1, 15) for value in (i, 2 * i)]
    assert "its bar against the workload's largest" in document.text


@pytest.mark.usefixtures("quick_figures")
def test_long_names_are_cut_short_in_the_overview_alone(tmp_path):
    document = written([replace(LORA, method="m" * 999, model="w" * 999, budget="b" * 999)], tmp_path)
    ((_, overview),) = [found for found in document.all("table") if found[0].get("class") == "overview"]
    assert len(overview) < 500
    assert "m" * 999 in document.text
    assert "w" * 999 in document.text


@pytest.mark.usefixtures("quick_figures")
def test_overview_says_what_it_leaves_out(tmp_path):
    records = [replace(LORA, seed=seed) for seed in range(10)]
    records += [replace(LORA, method=f"method {number}") for number in range(34)]
    document = written(records, tmp_path)
    assert "and 7 more below" in document.text
    assert "7 methods more stand in the tables below alone" in document.text


@pytest.mark.usefixtures("quick_figures")
def test_one_table_per_workload_and_regime(tmp_path):
    records = [LORA, replace(LORA, train_rest="none"), replace(LORA, dtype="bfloat16"), replace(LORA, model="other")]
    document = written(records, tmp_path)
    assert len(document.all("table")) == 4 + 1
    regions = [attrs for attrs, _ in document.all("div") if attrs.get("role") == "region"]
    assert regions.pop(0)["aria-labelledby"] == "overview"
    headings = {attrs.get("id"): text for attrs, text in document.all("h3")}
    assert [headings[attrs["aria-labelledby"]] for attrs in regions] == [
        "train_rest = all",
        "train_rest = none",
        "train_rest = all",
        "train_rest = all",
    ]
    # A container that scrolls must be reachable by keyboard.
    assert all(attrs["tabindex"] == "0" for attrs in regions)


@pytest.mark.usefixtures("quick_figures")
def test_each_heading_sorts(tmp_path):
    document = written([LORA, FULL], tmp_path)
    table = tables.results_table([LORA, FULL])
    sortable = [text for attrs, text in document.all("th") if "aria-sort" in attrs]
    assert sortable == [column.heading for column in table.columns]
    buttons = document.all("button")
    assert [text for _, text in buttons] == sortable
    assert all(attrs["type"] == "button" for attrs, _ in buttons)
    for (attrs, _), column in zip(buttons, table.columns, strict=True):
        assert meaning(column.field) in attrs["title"]


@pytest.mark.usefixtures("quick_figures")
def test_cells_show_the_table_and_sort_by_raw_values(tmp_path):
    document = written([LORA, FULL], tmp_path)
    table = tables.results_table([LORA, FULL])
    cells = [(attrs, text) for name in ("th", "td") for attrs, text in document.all(name) if "data-sort" in attrs]
    assert len(cells) == sum(len(row.cells) for row in table.rows)
    shown = {attrs["data-sort"]: text for attrs, text in cells}
    assert shown[str(30 * MIB)] == "30.00"
    assert shown["0.25"] == "250.00"
    assert shown[""] == "—not obtained"


@pytest.mark.usefixtures("quick_figures")
def test_unmatched_records_are_marked(tmp_path):
    document = written([LORA, FULL], tmp_path)
    marked = [text for attrs, text in document.all("td") if "flag" in (attrs.get("class") or "").split()]
    assert marked == ["unmatched: no budget to match"]


@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize("status", [status for status in STATUSES if status != "ok"])
def test_failures_show_status_and_reason(status, tmp_path):
    document = written([replace(LORA, status=status, reason="because & so")], tmp_path)
    assert f"{status}: because & so" in [text for _, text in document.all("td")]


@pytest.mark.usefixtures("quick_figures")
def test_long_reason_is_folded_and_complete(tmp_path):
    reason = "line of a traceback " * 100
    document = written([replace(LORA, status="crashed", reason=reason)], tmp_path)
    ((_, beginning),) = document.all("summary")
    assert len(beginning) <= page.LONGEST_REASON + 1
    assert reason.strip() in document.all("details")[0][1]


@pytest.mark.usefixtures("quick_figures")
def test_nothing_obtained_is_never_zero(tmp_path):
    document = written([Record(method="lora", model="m")], tmp_path)
    numbers = [text for attrs, text in document.all("td") if "number" in attrs.get("class", "")]
    assert numbers
    assert set(numbers) == {"—not obtained"}


@pytest.mark.usefixtures("quick_figures")
def test_text_of_records_is_escaped(tmp_path):
    texts = {
        field.name: HOSTILE
        for field in fields(Record)
        if "str" in str(field.type)
        and field.name not in ("status", "source", "train_rest", "device_semantics", "pairing", "timeline")
    }
    texts["timeline"] = Timeline(((HOSTILE, 0),), (0,), dict.fromkeys(BREAKDOWN, (1,))).dumps()
    records = [Record(**texts, status="crashed"), Record(**{**texts, "attention": "other"}, status="ok")]
    document = written(records, tmp_path)
    source = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert len(document.all("script")) == 1
    assert "<script>alert" not in source
    assert "{{ 7 * 7 }}" in document.text
    assert HOSTILE in document.text


@pytest.mark.parametrize(
    "weird",
    ["$\\frac{", "half \ud800 pair", "\x00\n\t", "", "x" * 3000],
    ids=["maths", "surrogate", "control", "empty", "long"],
)
def test_odd_names_get_a_page(weird, tmp_path):
    written([replace(LORA, method=weird, model=weird, budget=weird)], tmp_path)


def test_absurd_values_get_a_page(tmp_path):
    huge = {field.name: 10**400 for field in fields(Record) if field.name.endswith(("_bytes", "_params"))}
    document = written([LORA, replace(LORA, **huge, step_time_s=1e308), replace(LORA, step_time_s=5e-324)], tmp_path)
    assert "≈10^400.0" in document.text


def test_no_records(tmp_path):
    document = written([], tmp_path)
    assert "No records" in document.text
    assert not document.all("table")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["index.html", "records.csv"]
    assert from_csv((tmp_path / "records.csv").read_text(encoding="utf-8")) == []


def test_five_hundred_records_are_all_in_the_table(tmp_path):
    records = [replace(LORA, seed=seed) for seed in range(500)]
    document = written(records, tmp_path)
    assert len([attrs for attrs, _ in document.all("th") if attrs.get("scope") == "row"]) == 500 + 1
    for most in (panels.MOST_ROWS, timeline.MOST_PANELS):
        assert f"Of the 500 records with train_rest all the first {most} are drawn" in document.text


@pytest.mark.usefixtures("quick_figures")
def test_glossary_defines_every_field(tmp_path):
    document = written([LORA], tmp_path)
    terms = {attrs["id"]: text for attrs, text in document.all("div") if attrs.get("id", "").startswith("field-")}
    assert len(terms) == len(fields(Record))
    for field in fields(Record):
        assert meaning(field.name) in terms[f"field-{field.name}"]
    assert "(bytes)" in terms["field-peak_step_bytes"]
    assert "(seconds)" in terms["field-step_time_s"]


@pytest.mark.usefixtures("quick_figures")
def test_environment_is_shown_and_differences_counted(tmp_path):
    document = written([LORA, LORA, replace(LORA, torch_version="2.12.0")], tmp_path)
    values = [text for _, text in document.all("dd")]
    assert "2.11.0 (2 of the records)2.12.0 (1 of the records)" in values
    assert "some processor" in values
    assert "abc123-dirty" in values


@pytest.mark.usefixtures("quick_figures")
def test_many_environments_are_summed_up(tmp_path):
    document = written([replace(LORA, commit=f"{number:07x}") for number in range(page.MOST_VALUES + 4)], tmp_path)
    assert any(text.endswith("and 4 more") for _, text in document.all("dd"))


@pytest.mark.usefixtures("quick_figures")
def test_interrupted_report_leaves_the_old_page(tmp_path, monkeypatch):
    path = page.write_report([LORA], tmp_path)
    before = path.read_bytes()
    names = sorted(entry.name for entry in tmp_path.iterdir())
    replace_file = page.record.os.replace

    def fail_at_page(source, target):
        if target == path:
            raise OSError("no space")
        replace_file(source, target)

    monkeypatch.setattr(page.record.os, "replace", fail_at_page)
    with pytest.raises(OSError, match="no space"):
        page.write_report([FULL], tmp_path)
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == names


@pytest.mark.usefixtures("quick_figures")
def test_ids_are_unique_and_links_lead_somewhere(tmp_path):
    models = ["a", "b"]
    records = [
        replace(LORA, model=model, train_rest=rest) for model, rest in itertools.product(models, ("all", "none"))
    ]
    document = written(records, tmp_path)
    ids = [attrs["id"] for _, attrs, _ in document.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = [attrs["href"] for attrs, _ in document.all("a")]
    assert [link for link in links if link.startswith("#workload")] == ["#workload-1"] * 2 + ["#workload-2"] * 2
    assert {link.removeprefix("#") for link in links} <= set(ids)


@pytest.mark.usefixtures("quick_figures")
def test_a_name_cannot_turn_the_direction_of_the_page(tmp_path):
    turned = replace(LORA, method="a\u202eb", model="c\u2067d", device_name="e\u200ff", commit="g\u061ch")
    source = page.write_report([turned], tmp_path).read_text(encoding="utf-8")
    assert not re.search("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]", source)
    for name in ("a\ufffdb", "c\ufffdd", "e\ufffdf", "g\ufffdh"):
        assert name in source
