import base64
import itertools
import re
from dataclasses import fields, replace
from html.parser import HTMLParser

import pytest

from reports import figures, page, tables
from reports.record import STATUSES, Record, from_csv, meaning

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
    kinds = tuple(replace(kind, draw=lambda *_: b"\x89PNG") for kind in page.KINDS)
    monkeypatch.setattr(page, "KINDS", kinds)


def written(records, tmp_path) -> Document:
    return Document(page.write_report(records, tmp_path).read_text(encoding="utf-8"))


def test_writes_page_csv_and_figures(tmp_path):
    records = [LORA, FULL, replace(LORA, train_rest="none"), replace(LORA, dtype="bfloat16")]
    path = page.write_report(records, tmp_path / "new" / "out")
    assert path == tmp_path / "new" / "out" / "index.html"
    images = [f"{kind.stem}-{number}.png" for kind in page.KINDS for number in (1, 2)]
    assert sorted(entry.name for entry in path.parent.iterdir()) == sorted(["index.html", "records.csv", *images])
    for name in images:
        assert (path.parent / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert from_csv((path.parent / "records.csv").read_text(encoding="utf-8")) == records


def test_page_needs_nothing_else(tmp_path):
    document = written([LORA], tmp_path)
    assert not document.all("link")
    for _, attrs, _ in document.elements:
        for name in ("src", "srcset", "href", "action"):
            assert (attrs.get(name) or "#").startswith(("data:image/png;base64,", "#")), attrs
    source = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest", source)


def test_embedded_figures_are_those_drawn_and_have_a_text_twin(tmp_path):
    document = written([LORA, FULL], tmp_path)
    images = [attrs for attrs, _ in document.all("img")]
    assert [attrs["class"] for attrs in images] == ["wide light", "wide dark", "narrow light", "narrow dark"] * 2
    decoded = [base64.b64decode(attrs["src"].split(",", 1)[1]) for attrs in images]
    assert decoded[0] == (tmp_path / "breakdown-1.png").read_bytes()
    assert decoded[4] == (tmp_path / "counts-1.png").read_bytes()
    title = tables.Workload.of(LORA).title
    panels = {"all": [LORA, FULL]}
    assert {attrs["alt"] for attrs in images} == {
        figures.breakdown_alt(title, panels),
        figures.counts_alt(title, panels),
    }


@pytest.mark.usefixtures("quick_figures")
def test_one_table_per_workload_and_regime(tmp_path):
    records = [LORA, replace(LORA, train_rest="none"), replace(LORA, dtype="bfloat16"), replace(LORA, model="other")]
    document = written(records, tmp_path)
    assert len(document.all("table")) == 4
    regions = [attrs for attrs, _ in document.all("div") if attrs.get("role") == "region"]
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
    marked = [text for attrs, text in document.all("td") if attrs.get("class") == "flag"]
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
        if "str" in str(field.type) and field.name not in ("status", "source", "train_rest", "device_semantics")
    }
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
    assert len([attrs for attrs, _ in document.all("th") if attrs.get("scope") == "row"]) == 500
    assert f"Of the 500 records with train_rest all the first {figures.MOST_DRAWN} are drawn" in document.text


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
    assert len(links) == len(models)
    assert {link.removeprefix("#") for link in links} <= set(ids)
