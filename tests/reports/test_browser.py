"""The page in a real browser: it must read well whatever the records hold, on a phone and on a desk, light and dark.

Nothing here knows how the page is made up, so that a page with other figures and other tables is held to the same.
"""

import itertools
import json
import re
import typing
from collections import defaultdict
from dataclasses import fields, replace
from urllib.parse import quote

import pytest

from reports import claim, page, space, tables
from reports.history import Line, Trend
from reports.palette import METHOD_COLOURS
from reports.record import BREAKDOWN, STATUSES, Record, RecordError
from reports.thresholds import read_thresholds
from reports.timeline import MOST_SAMPLES, Timeline
from reports.trend import write_trend
from tests.reports.test_claim import a_claim, poisoned, the_paper
from tests.reports.test_quality import a_study
from tests.reports.test_space import a_space

MIB = 2**20
SCREENS = list(itertools.product((390, 1400), ("light", "dark")))
PHASES = (("forward", 0), ("backward", 40), ("optimizer", 80))
METHODS = ("full", "head", "lora", "meprop-example", "meprop-weight", "random-mask", "sparsegrad", "one-of-my-own")
# What the records of one file usually share.
SHARED = {
    "model": "encoder",
    "batch": 16,
    "seq": 64,
    "data": "trec",
    "device_name": "some processor",
    "threads": 2,
    "commit": "abc123",
    "created_at": "2026-01-01T00:00:00+00:00",
    "torch_version": "2.13.0",
}
# Text of which a browser would make something if it were not escaped; each way of doing so leaves `pwned` behind.
MARKUP = (
    "<script>window.pwned=1;alert(1)</script></script></style></title></td></table><img src=x onerror=window.pwned=1>"
    "<b class=pwned>bold</b>\"'><i onmouseover='window.pwned=1' class=pwned>&amp;{{ 7*7 }}$\\frac{-->"
)
BROKEN_TEXT = "control \x00\x01\x1b\n half \ud800 pair, no character \ufffe, right to left \u202e"


def timeline(scale: int = MIB, samples: int = 120, phases=PHASES) -> str:
    wave = [scale * (step % 50 + 1) for step in range(samples)]
    return Timeline(phases, tuple(range(samples)), {name: tuple(wave) for name in BREAKDOWN}).dumps()


def named(number: int) -> dict[str, object]:
    return {**SHARED, "method": METHODS[number % len(METHODS)], "budget": 1000 + number}


def measured(number: int, **circumstances) -> Record:
    """A record that ended ok, no two with the same label or the same peak."""
    size = number * 37 % 503 * MIB + number + 1
    values = {
        **dict.fromkeys(("resident_bytes", "peak_forward_bytes", "peak_optimizer_bytes", "peak_eval_bytes"), size),
        **dict.fromkeys(("total_params", "trainable_params", "state_params", "touched_params"), 10**6 + number),
        **dict.fromkeys(("updated_params", "budget_params"), number + 1),
        **dict.fromkeys(("peak_backward_bytes", "peak_step_bytes"), 6 * size),
        **dict.fromkeys(BREAKDOWN, size),
        "peak_phase": "backward",
        "process_peak_bytes": 2**30,
        "kernel_workspace_bytes": 0,
        "matched": number % 3 == 0,
        "step_time_s": 0.1 + 0.001 * number,
        "reference_step_time_s": 0.2,
        "step_time_ratio": 0.5 + 0.005 * number,
        "step_time_ratio_low": 0.4 + 0.005 * number,
        "step_time_ratio_high": 0.6 + 0.005 * number,
        "pairing": "rounds",
        "timed_rounds": 30,
        "timeline": timeline(),
    }
    return Record(**{**named(number), **values, **circumstances})


def failed(number: int, status: str, **circumstances) -> Record:
    """A record without a single number that was measured."""
    return Record(**{**named(number), "status": status, "reason": f"reason {number} for {status}", **circumstances})


def filled(base: Record, value: object, kind: type) -> Record:
    """`base` with `value` in every field of this type that takes it."""
    hints = typing.get_type_hints(Record)
    for field in fields(Record):
        if kind in (typing.get_args(hints[field.name]) or (hints[field.name],)) and field.name != "schema_version":
            own = f"{field.name} {value}" if kind is str else value
            try:
                base = replace(base, **{field.name: own})
            except RecordError:
                continue
    return base


def many() -> list[Record]:
    """500 records: 5 workloads, both regimes, every status."""
    records = []
    for number in range(500):
        where = {
            "model": f"model {number % 5}",
            "seq": 64 * (number % 5 + 1),
            "train_rest": ("all", "none")[number // 5 % 2],
        }
        status = (*STATUSES, "ok", "ok")[number // 30 % (len(STATUSES) + 2)]
        record = measured(number, **where) if status == "ok" else failed(number, status, **where)
        records.append(replace(record, source="predicted") if number % 7 == 0 else record)
    return records


def every_status() -> list[Record]:
    records = [measured(0, method="full"), measured(1, method="lora"), measured(2, source="predicted")]
    return records + [failed(3 + number, status) for number, status in enumerate(STATUSES) if status != "ok"]


def absurd() -> list[Record]:
    base = Record(method="lora", model="absurd")
    zero = filled(filled(replace(base, method="zero", data=""), 0.0, float), 0, int)
    huge = filled(filled(replace(base, method="huge"), 1e308, float), 10**40, int)
    huge = replace(huge, timeline=timeline(10**40, MOST_SAMPLES), pairing="blocks", data="word" * 3000)
    return [
        replace(zero, method="full", step_time_ratio=1.0, timeline=timeline(0, 1, (("forward", 0),))),
        zero,
        huge,
        replace(huge, method="lora", peak_step_bytes=1, step_time_s=5e-324, step_time_ratio_low=0.0, budget=1e-308),
        replace(huge, method="negative", kernel_workspace_bytes=-(10**12), preparation_workspace_bytes=-1, seed=-5),
        replace(base, method="nothing"),
        replace(base, method="n" * 3000, model="absurd", budget="9" * 400),
        replace(base, method="talkative", status="crashed", reason="longword" * 12_500),
        replace(base, method="traceback", status="crashed", reason="line of a traceback\n" * 5_000),
        replace(base, method="elsewhere", model="m" * 5000, dtype="d" * 500),
    ]


def hostile() -> list[Record]:
    base = measured(1, timeline=timeline(phases=(("forward", 0), (f"phase {MARKUP}", 10))))
    first = filled(base, MARKUP, str)
    # A second value for every field, so that none is only shown as what all rows share.
    return [
        first,
        replace(filled(first, f"other {MARKUP}", str), model=first.model, dtype=first.dtype),
        replace(first, status="crashed", reason=f"reason {MARKUP}"),
        filled(measured(2), BROKEN_TEXT, str),
    ]


def for_cards() -> list[Record]:
    """Predictions for CUDA, of which some must fit on a card, beside measurements of the same."""
    cuda = {"device": "cuda", "device_semantics": "cuda", "step_time_s": None, "timeline": None}
    sizes = {"peak_reserved_bytes": 20 * 2**30, "peak_requested_bytes": 2**30, "peak_preparation_bytes": 2**31}
    measurements = [measured(number, **cuda, **sizes) for number in range(3)]
    predictions = [replace(one, source="predicted", gpu="9.0", device_name=None) for one in measurements]
    first = predictions[0]
    return [
        *measurements,
        *predictions,
        replace(first, peak_preparation_bytes=30 * 2**30, resident_bytes=7),
        replace(first, peak_step_bytes=3 * 2**40, peak_reserved_bytes=3 * 2**40, train_rest="none"),
        replace(first, gpu=MARKUP, attention="sdpa", attention_kernel=MARKUP, fits=False, gpu_memory_bytes=48 * 2**30),
        replace(first, model="large", gpu_memory_bytes=16 * 2**30, fits=False, oom_phase=MARKUP),
        replace(first, model="large", peak_reserved_bytes=10**40),
        failed(9, "refused", source="predicted", **cuda),
    ]


def every_method() -> list[Record]:
    """So many methods on one workload that the overview has them one below the other."""
    return [measured(number, method=name) for number, name in enumerate([*METHOD_COLOURS, "x.py:" + "Own" * 20])]


RECORDS = {
    "none": list,
    "every method": every_method,
    "one": lambda: [measured(3)],
    "five hundred": many,
    "every status": every_status,
    "absurd": absurd,
    "hostile": hostile,
    "for cards": for_cards,
}

# Finds what is wrong with a document as it is shown now; returns [kind, text] of each defect, at most ten of a kind.
EXAMINE = r"""
(async ({ width, theme, files }) => {
  const found = [], counts = {};
  const defect = (kind, text) => {
    counts[kind] = (counts[kind] || 0) + 1;
    if (counts[kind] <= 10) found.push([kind, String(text).slice(0, 200)]);
  };
  const name = (element) =>
    `<${element.localName} class="${element.className}"> ${element.textContent.trim().slice(0, 40)}`;
  const root = document.documentElement;
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  const shown = (element) => element.checkVisibility({ opacityProperty: true, visibilityProperty: true });

  // The screen is what was asked for, and the page is laid out for it.
  if (matchMedia("(prefers-color-scheme: dark)").matches !== (theme === "dark")) defect("screen", "not " + theme);
  if (root.clientWidth !== width || innerWidth !== width) defect("screen", `${root.clientWidth}, ${innerWidth} wide`);

  // Nothing sticks out, hidden or not, but what a region of its own scrolls.
  if (root.scrollWidth > root.clientWidth) defect("overflow", `the document is ${root.scrollWidth} px wide`);
  const scrolls = (element) => ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
  const region = (element) => {
    for (let up = element; up && up !== root && up !== document.body; up = up.parentElement) if (scrolls(up)) return up;
  };
  for (const element of document.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    if (box.width && (box.right > width + 0.5 || box.left < -0.5) && shown(element) && !region(element.parentElement))
      defect("overflow", `${Math.round(box.left)} to ${Math.round(box.right)} px: ${name(element)}`);
  }
  for (const table of document.querySelectorAll("table")) {
    const around = region(table);
    if (!around) defect("table", "not in a region that scrolls");
    else if (around.scrollWidth > around.clientWidth) {
      if (around.tabIndex < 0) defect("table", "its region cannot be scrolled by keyboard");
      for (const cell of table.querySelectorAll("tbody tr:first-child > *"))
        if (getComputedStyle(cell).position === "sticky" && cell.offsetWidth > 0.7 * around.clientWidth)
          defect("table", `what stays in place takes ${cell.offsetWidth} of ${around.clientWidth} px`);
    }
    for (const cell of table.querySelectorAll("th, td"))
      if (cell.scrollWidth > cell.clientWidth + 1) defect("table", `${name(cell)} is wider than its cell`);
  }

  // Colours as numbers: canvas understands every way to write one.
  const pixel = Object.assign(document.createElement("canvas"), { width: 1, height: 1 })
    .getContext("2d", { willReadFrequently: true });
  const rgba = ((known) => (colour) => {
    if (!known.has(colour)) {
      pixel.clearRect(0, 0, 1, 1);
      pixel.fillStyle = colour;
      pixel.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = pixel.getImageData(0, 0, 1, 1).data;
      known.set(colour, [r, g, b, a / 255]);
    }
    return known.get(colour);
  })(new Map());
  const over = ([r, g, b, a], below) => [r, g, b].map((part, i) => part * a + below[i] * (1 - a)).concat(1);
  const light = (colour) => colour.slice(0, 3).map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
  const contrast = (a, b) => {
    const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const canvasColour = theme === "dark" ? [18, 18, 18, 1] : [255, 255, 255, 1];
  const grounds = new Map();
  const ground = (element) => {
    if (!element) return canvasColour;
    if (!grounds.has(element)) {
      const own = rgba(getComputedStyle(element).backgroundColor);
      grounds.set(element, own[3] === 1 ? own : over(own, ground(element.parentElement)));
    }
    return grounds.get(element);
  };

  // Text can be read: large enough and apart from what is behind it.
  const read = (element, style, what) => {
    if (parseFloat(style.fontSize) < 11) defect("small text", `${style.fontSize}: ${what}`);
    const behind = ground(element), ratio = contrast(over(rgba(style.color), behind), behind);
    if (ratio < 4.5) defect("contrast", `${ratio.toFixed(2)}, ${style.color} on ${behind}: ${what}`);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const seen = new Set();
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || seen.has(element) || !shown(element)) continue;
    seen.add(element);
    read(element, getComputedStyle(element), name(element));
    for (const pseudo of ["::before", "::after"]) {
      const style = getComputedStyle(element, pseudo);
      if (!["none", "normal", '""'].includes(style.content)) read(element, style, pseudo + name(element));
    }
  }
  if (!seen.size) defect("contrast", "there is no text");

  // Figures: one rendering each, decoded, made for this screen and this theme, and told in words.
  for (const figure of document.querySelectorAll("figure")) {
    const showing = [...figure.querySelectorAll("img, svg, canvas")].filter(shown);
    if (showing.length !== 1) defect("figure", `${showing.length} renderings shown`);
  }
  const page = ground(document.body);
  for (const image of [...document.images]) {
    if (!image.alt.trim()) defect("figure", "no alternative text");
    if (!shown(image)) continue;
    try { await image.decode(); } catch (error) { defect("figure", `not decoded: ${error.message}`); continue; }
    const box = image.getBoundingClientRect();
    if (!image.naturalWidth || !box.width || !box.height) { defect("figure", "empty"); continue; }
    if (box.left < 0 || box.right > width) defect("figure", `${box.left} to ${box.right} px`);
    const stretched = box.width / box.height / (image.naturalWidth / image.naturalHeight);
    if (Math.abs(stretched - 1) > 0.02) defect("figure", `stretched by ${stretched}`);
    // Drawn for dense screens, an image may have twice the pixels; with more it was drawn for a wider place than this.
    if (image.naturalWidth > 2.5 * box.width) defect("figure", `${image.naturalWidth} px shown as ${box.width} px`);
    const w = Math.min(image.naturalWidth, 600), h = Math.min(image.naturalHeight, 200);
    const context = Object.assign(document.createElement("canvas"), { width: w, height: h }).getContext("2d");
    context.fillStyle = `rgb(${page.slice(0, 3).join(" ")})`;
    context.fillRect(0, 0, w, h);
    context.drawImage(image, 0, 0);
    const data = context.getImageData(0, 0, w, h).data;
    if ([0, 1, 2].some((i) => Math.abs(data[i] - page[i]) > 4))
      defect("figure", `its ground is ${data.slice(0, 3)}, not the page's ${page}`);
    let best = 1;
    for (let i = 0; i < data.length; i += 4)
      if (data[i] !== page[0] || data[i + 1] !== page[1])
        best = Math.max(best, contrast([data[i], data[i + 1], data[i + 2]], page));
    if (best < 7) defect("figure", `nothing in it stands out: ${best.toFixed(1)}`);
  }

  // Ids and what refers to them.
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  if (new Set(ids).size !== ids.length) defect("link", "an id stands twice");
  const lead = (id, from) => ids.includes(id) || defect("link", `${from} leads to ${id}, which is not there`);
  for (const link of document.querySelectorAll("[href]")) {
    const target = link.getAttribute("href");
    if (target.startsWith("#")) lead(decodeURIComponent(target.slice(1)), "a link");
    else if (!["index.html", "trend.html", ...files].includes(target)) defect("link", `leads away: ${target}`);
  }
  for (const attribute of ["aria-labelledby", "aria-describedby", "for"])
    for (const element of document.querySelectorAll(`[${attribute}]`))
      for (const id of element.getAttribute(attribute).split(/\s+/)) lead(id, attribute);

  // What text of records must not become.
  for (const element of document.querySelectorAll("*"))
    for (const { name: attribute } of element.attributes)
      if (attribute.startsWith("on")) defect("injected", `${attribute} on ${name(element)}`);
  for (const element of document.querySelectorAll(".pwned, script[src], iframe, object, embed, base, form, link"))
    defect("injected", name(element));
  if (window.pwned !== undefined) defect("injected", "a script of a record ran");

  for (const violation of window.violations) defect("policy", violation);
  for (const entry of performance.getEntriesByType("resource"))
    if (!entry.name.startsWith("data:")) defect("request", entry.name);
  return found;
})
"""

# Presses every heading that sorts, twice; returns the defects as above.
SORT = r"""
(() => {
  const found = [];
  const collator = new Intl.Collator(undefined, { numeric: true });
  let pressed = 0;
  for (const table of document.querySelectorAll("table")) {
    const body = table.tBodies[0], rows = new Set(body.rows);
    const headings = [...table.querySelectorAll("th[aria-sort]")];
    for (const heading of headings) {
      const orders = [];
      for (const time of ["once", "twice"]) {
        const defect = (text) => found.push(["sorting", `${heading.textContent}, pressed ${time}: ${text}`]);
        heading.querySelector("button").click();
        pressed += 1;
        const order = heading.getAttribute("aria-sort");
        orders.push(order);
        if (headings.some((other) => other !== heading && other.getAttribute("aria-sort") !== "none"))
          defect("another heading says it sorts too");
        if (rows.size !== body.rows.length || [...body.rows].some((row) => !rows.has(row))) defect("rows are lost");
        const keys = Array.from(body.rows, (row) => row.cells[heading.cellIndex].dataset.sort);
        const present = keys.filter((key) => key !== "");
        if (keys.slice(0, present.length).includes("")) defect("what is missing is not last");
        // Every key a number: then they are in the order of numbers, whatever the column is.
        const numbers = present.map(Number), numeric = !numbers.some(Number.isNaN);
        const sign = order === "descending" ? -1 : 1;
        for (let i = 1; i < present.length; i++) {
          const step = numeric ? numbers[i] - numbers[i - 1] : collator.compare(present[i], present[i - 1]);
          if (step * sign < 0) { defect(`${present[i - 1]} before ${present[i]}, ${order}`.slice(0, 200)); break; }
        }
      }
      if (orders.sort().join() !== "ascending,descending") found.push(["sorting", `${heading.textContent}: ${orders}`]);
    }
  }
  return { found, pressed };
})()
"""

# The body rows of all tables, as they are shown.
ROWS = r"""
Array.from(document.querySelectorAll("table"), (table) => ({
  sortable: table.querySelector("th[aria-sort]") !== null,
  rows: Array.from(table.tBodies[0].rows, (row) => ({
    label: (row.querySelector("th") || row.cells[0]).innerText.trim(),
    cells: Array.from(row.cells, (cell) => ({
      key: cell.dataset.sort,
      numeric: getComputedStyle(cell).textAlign === "right",
      text: cell.innerText.trim(),
      visible: (cell.querySelector("[aria-hidden]") || cell).innerText.trim(),
    })),
  })),
}))
"""


def examine(tab, width: int, theme: str, files: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """The page's defects on such a screen, by kind, with whatever went wrong since it was opened.

    `files` stand beside the page, so that it may link to them.
    """
    tab.show(width, theme)
    defects = tab.evaluate(f"({EXAMINE})({json.dumps({'width': width, 'theme': theme, 'files': files})})")
    # The page itself is the one request; what it carries within is none.
    asked = [url for url in tab.requests if not url.startswith("data:")][1:]
    kinds = defaultdict(list)
    for kind, text in [*defects, *tab.complaints, *(("request", url) for url in asked)]:
        kinds[kind].append(text)
    return dict(kinds)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Writes a report once, when it is first asked for; returns its page and its records."""
    pages = {}

    def write(name: str):
        if name not in pages:
            records = RECORDS[name]()
            pages[name] = page.write_report(records, tmp_path_factory.mktemp("report")), records
        return pages[name]

    return write


@pytest.fixture(scope="module")
def opened(browser, written):
    """Opens a report in a tab of its own, once."""
    tabs = {}

    def open_tab(name: str):
        if name not in tabs:
            path, _ = written(name)
            tabs[name] = browser.open(path)
            # What is folded away must read as well as what is not.
            tabs[name].evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
        return tabs[name]

    yield open_tab
    for tab in tabs.values():
        tab.close()


@pytest.mark.parametrize(("width", "theme"), SCREENS)
@pytest.mark.parametrize("name", RECORDS)
def test_page_has_no_defect(name, width, theme, opened):
    assert examine(opened(name), width, theme) == {}


def moved(records: list[Record]) -> list[Record]:
    """The same benchmarks after something happened to each: more bytes, another time, another environment, a crash."""
    sizes = [replace(one, peak_step_bytes=(one.peak_step_bytes or 0) + 12, trainable_params=7) for one in records]
    times = {"step_time_ratio": 3.0, "step_time_ratio_low": 2.5, "step_time_ratio_high": 3.5}
    slower = [replace(one, **times, torch_version=f"new {one.torch_version}") for one in sizes[::2]]
    return [*slower, *(replace(one, status="crashed", reason=f"why {MARKUP}") for one in sizes[1::2])]


def never_twice(records: list[Record]) -> list[Record]:
    return [replace(one, seed=number, timeline=None) for number, one in enumerate(records)]


def before_and_after(records: list[Record]) -> list[list[Record]]:
    """Three commits: in the second everything moves, and the third lacks a benchmark."""
    records = never_twice(records)
    return [records, moved(records), moved(records)[1:]]


HISTORIES = {
    "none": lambda: [],
    "ordinary": lambda: before_and_after([measured(number) for number in range(5)]),
    "absurd": lambda: before_and_after(absurd()),
    "hostile": lambda: before_and_after(hostile()),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_trend_has_no_defect(name, browser, tmp_path):
    thresholds = read_thresholds()
    lines = [
        Line.of(records, thresholds, f"{number:040x}{'-dirty' * (number % 2)}", f"2026-01-{number + 1:02}T00:00:00")
        for number, records in enumerate(HISTORIES[name]())
    ]
    path = write_trend(Trend.of(map(Line.loads, map(Line.dumps, lines)), thresholds), tmp_path)
    tab = browser.open(path)
    assert {screen: found for screen in SCREENS if (found := examine(tab, *screen))} == {}
    assert tab.evaluate("document.scripts.length") == 0
    if name == "hostile":
        assert MARKUP.split("$")[0] in tab.evaluate("document.body.innerText")
    tab.close()


def whole_claim() -> dict[str, object]:
    """A claim in which nothing is missing."""
    return {**a_claim(), "quality": a_study(), "space": a_space(), "paper": the_paper()}


CLAIMS = {
    "whole": whole_claim,
    "quick and not studied": lambda: {**a_claim(), "quick": True, "sensitivity": [], "turns": [], "cards": []},
    "hostile": lambda: poisoned(a_claim(), MARKUP),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_claim_has_no_defect(name, browser, tmp_path):
    tab = browser.open(claim.write_page(CLAIMS[name](), tmp_path))
    tab.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    files = tuple(file for file, _ in (*claim.FILES, *space.FILES))
    assert {screen: found for screen in SCREENS if (found := examine(tab, *screen, files))} == {}
    assert tab.evaluate("document.scripts.length") == 0
    tab.close()


@pytest.mark.parametrize("name", RECORDS)
def test_summary_counts_the_records(name, opened, written):
    count = len(written(name)[1])
    text = opened(name).evaluate("document.body.innerText")
    said = {0: r"\bno records\b", 1: r"\b1 record\b(?!s)"}.get(count, rf"\b{count:,} records\b")
    assert re.search(said, text, re.IGNORECASE)


@pytest.mark.parametrize("name", ["one", "five hundred", "every status"])
def test_every_record_is_a_row_with_its_own_numbers(name, opened, written):
    shown = {
        (row["label"], cell["key"])
        for table in opened(name).evaluate(ROWS)
        if table["sortable"]
        for row in table["rows"]
        for cell in row["cells"]
    }
    for record in written(name)[1]:
        peak = "" if record.peak_step_bytes is None else str(record.peak_step_bytes)
        assert (record.label, peak) in shown


def test_every_record_is_a_row_once(opened, written):
    labels = [
        row["label"] for table in opened("five hundred").evaluate(ROWS) if table["sortable"] for row in table["rows"]
    ]
    assert sorted(labels) == sorted(record.label for record in written("five hundred")[1])


@pytest.mark.parametrize("name", ["one", "five hundred", "every status", "absurd", "for cards"])
def test_missing_is_never_zero_and_zero_never_missing(name, opened):
    cells = [
        cell for table in opened(name).evaluate(ROWS) for row in table["rows"] for cell in row["cells"] if "key" in cell
    ]
    missing = {cell["visible"] for cell in cells if cell["key"] == ""}
    assert missing <= {tables.MISSING}
    zeros = {cell["text"] for cell in cells if cell["numeric"] and cell["key"] in ("0", "0.0")}
    # A ratio has its interval behind it.
    assert {text.removesuffix(" (0 to 0)") for text in zeros} == {"0"}
    others = {cell["text"] for cell in cells if cell["numeric"] and cell["key"] not in ("", "0", "0.0")}
    assert others.isdisjoint({"", "0", "0.00", "-0", "-0.00", "nan", "inf", "None", tables.MISSING})
    if name != "one":
        assert missing == {tables.MISSING}


def test_statuses_are_shown_with_their_reasons(opened, written):
    text = opened("every status").evaluate("document.body.innerText")
    for record in written("every status")[1]:
        assert record.status == "ok" or f"{record.status}: {record.reason}" in text


def test_markup_in_records_is_text(opened, written):
    tab = opened("hostile")
    text = tab.evaluate("document.body.innerText")
    first, other, crashed, _ = written("hostile")[1]
    for name in ("method", "model", "budget", "data", "device_name", "commit", "torch_version", "attention"):
        assert getattr(first, name) in text
        assert getattr(other, name) in text
    assert crashed.reason in text
    assert tab.evaluate("document.scripts.length") == opened("one").evaluate("document.scripts.length")
    assert tab.evaluate("typeof window.pwned") == "undefined"


@pytest.mark.parametrize("name", RECORDS)
def test_each_heading_sorts(name, opened, written):
    tab = opened(name)
    outcome = tab.evaluate(SORT)
    assert outcome["found"] == []
    # A page of records has headings to press, about twenty a table.
    assert outcome["pressed"] >= (20 if written(name)[1] else 0)
    assert tab.complaints == []


def test_numbers_by_which_rows_differ_sort_as_numbers(browser, tmp_path):
    rates = [1e-05, 0.0003, 0.001, 2e-06, 0.1]
    path = page.write_report([measured(number, lr=rate, seed=-number) for number, rate in enumerate(rates)], tmp_path)
    tab = browser.open(path)
    assert tab.evaluate(SORT)["found"] == []
    tab.close()


@pytest.mark.parametrize(("key", "code", "text"), [("Enter", 13, "\r"), (" ", 32, " ")], ids=["enter", "space"])
def test_sorts_by_keyboard(key, code, text, browser, written):
    path, records = written("every status")
    tab = browser.open(path)
    numbered = sorted(
        (record for record in records if record.status == "ok"), key=lambda record: record.peak_step_bytes
    )
    # The column is found by what stands in it.
    tab.evaluate(
        f"""(() => {{
          const peak = '[data-sort="{numbered[0].peak_step_bytes}"]';
          const cell = [...document.querySelectorAll(peak)].find((cell) => cell.closest("table").tHead);
          const table = cell.closest("table");
          const headings = [...table.querySelectorAll("th[aria-sort]")];
          window.body = table.tBodies[0];
          window.heading = headings.find((heading) => heading.cellIndex === cell.cellIndex);
          heading.querySelector("button").focus();
        }})()"""
    )
    for order, expected in (("ascending", numbered), ("descending", numbered[::-1])):
        tab.press(key, code, text)
        assert tab.evaluate("heading.getAttribute('aria-sort')") == order
        shown = tab.evaluate("Array.from(body.rows, (row) => row.cells[0].innerText.trim())")
        assert shown[: len(expected)] == [record.label for record in expected]
        assert len(shown) == len(records)
    tab.close()


# One defect each, put into a page that has none: what the examination must say about it.
PIXEL = "R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs="
DEFECTS = {
    "too wide": ("overflow", '<div style="width: 2000px">wide</div>'),
    "too wide and cut off": (
        "overflow",
        '<style>html, body { overflow-x: hidden }</style><p style="width: 2000px">w</p>',
    ),
    "table outside a region": ("table", "<table><tbody><tr><td>1</td></tr></tbody></table>"),
    "cell that overflows": (
        "table",
        '<div style="overflow-x: auto"><table style="table-layout: fixed; width: 50px"><tbody>'
        "<tr><td>longestwordofall</td></tr></tbody></table></div>",
    ),
    "script": ("injected", "<script>window.pwned = 1</script>"),
    "handler": ("injected", '<b onmouseover="1">b</b>'),
    "script that throws": ("script error", "<script>throw new Error('oh')</script>"),
    "promise that fails": ("script error", "<script>Promise.reject(new Error('oh'))</script>"),
    "dialog": ("dialog", "<script>alert(1)</script>"),
    "image of a file": ("policy", '<img src="missing.png" alt="a">'),
    "image of the network": ("policy", '<img src="https://example.org/a.png" alt="a">'),
    "style of the network": ("policy", '<style>@import "https://example.org/a.css";</style>'),
    "image that is none": ("figure", '<img src="data:image/png;base64,iVBORw0KGgo=" alt="a">'),
    "no alternative text": ("figure", f'<img src="data:image/gif;base64,{PIXEL}">'),
    "image of one colour": ("figure", f'<img src="data:image/gif;base64,{PIXEL}" alt="a">'),
    "two renderings": ("figure", "<figure><svg></svg><svg></svg></figure>"),
    "no rendering": ("figure", "<figure></figure>"),
    "wrong rendering": ("figure", "<style>figure img { display: block !important }</style>"),
    "faint": ("contrast", '<p style="color: #888">faint</p>'),
    "faint on its own ground": ("contrast", '<p style="background: rgb(0 0 0 / 60%)"><b>faint</b></p>'),
    "small": ("small text", '<p style="font-size: 10px">small</p>'),
    "id twice": ("link", '<p id="twice">1</p><p id="twice">2</p>'),
    "link to nowhere": ("link", '<a href="#nowhere">there</a>'),
    "link away": ("link", '<a href="records.csv">there</a>'),
}


@pytest.fixture
def altered(browser, written, tmp_path):
    """Opens the page of one record with something added at its end, and without what matches `removed`."""
    tabs = []

    def open_tab(added: str = "", removed: str | None = None):
        source = written("one")[0].read_text(encoding="utf-8")
        if removed is not None:
            source, count = re.subn(removed, "", source)
            assert count == 1
        assert source.count("</body>") == 1
        path = tmp_path / "index.html"
        path.write_text(source.replace("</body>", f"{added}</body>"), encoding="utf-8")
        tabs.append(browser.open(path))
        return tabs[-1]

    yield open_tab
    for tab in tabs:
        tab.close()


@pytest.mark.parametrize(("kind", "added"), DEFECTS.values(), ids=DEFECTS)
def test_examination_finds_the_defect(kind, added, altered):
    assert kind in examine(altered(added), 390, "light")


@pytest.mark.parametrize("source", ["https://example.org/a.png", "http://192.0.2.1/a.png", "missing.png"])
def test_examination_finds_requests(source, altered):
    tab = altered(f'<img src="{source}" alt="a">', removed="<meta [^>]*Content-Security-Policy[^>]*>")
    assert {"request", "figure"} <= set(examine(tab, 390, "light"))


def test_examination_finds_a_page_not_made_for_phones(altered):
    tab = altered(removed='<meta name="viewport"[^>]*>')
    assert "screen" in examine(tab, 390, "light")
    assert examine(tab, 1400, "light") == {}


def test_examination_finds_a_figure_of_the_other_theme(altered):
    tab = altered("<style>@media (prefers-color-scheme: dark) { body { background: #000 !important } }</style>")
    assert examine(tab, 1400, "light") == {}
    assert "figure" in examine(tab, 1400, "dark")


def test_examination_accepts_other_kinds_of_figures(altered):
    drawing = (
        "<svg xmlns='http://www.w3.org/2000/svg' width='300' height='100'>"
        "<text x='9' y='60' font-size='40'>text</text></svg>"
    )
    tab = altered(f'<figure><img style="display: block" alt="a" src="data:image/svg+xml,{quote(drawing)}"></figure>')
    assert examine(tab, 390, "light") == {}
    # Black on nothing cannot be read in the dark.
    assert set(examine(tab, 390, "dark")) == {"figure"}


def test_examination_finds_what_does_not_sort(altered):
    tab = altered("<script>addEventListener('click', (event) => event.stopImmediatePropagation(), true)</script>")
    assert tab.evaluate(SORT)["found"]
