"""The claim's page: every verdict is shown, what comes from a file is escaped, and missing quality is no pass."""

import copy
import re
from html import unescape

import pytest

from reports import claim, sheet
from reports.figures import claim as figures

MIB = 2**20
DEFINITIONS = {"resident_bytes": "live after a step", "peak_step_bytes": "the largest of the three phases"}
COMPARISON = {
    **dict.fromkeys(("figure", "low", "high", "p_holm", "detectable", "seeds_to_decide", "equivalent", "reason")),
    "unit": "points",
    "peak_ratio": 1.28,
    "without": None,
    "per_task": [],
}
HOSTILE = "<script>alert(1)</script>\"'&</td>{{ 7 * 7 }}"


def memory(method, ratio, budgets="equal", **fields):
    row = {
        "case": "case-a",
        "semantics": "cuda",
        "method": method,
        "label": f"{method}[7]",
        "ours": "-" in method,
        "budgets": budgets,
        "budget_params": 700,
        "trainable_params": 900,
        "status": "ok",
        "reason": None,
        "bytes": {name: None if ratio is None else int(ratio * 100 * MIB) for name in DEFINITIONS},
        "to_lora": dict.fromkeys(DEFINITIONS, ratio),
    }
    return {**row, **fields}


def verdict(reading, method, word, direction, figure, **fields):
    row = {
        "reading": reading,
        "case": "case-a",
        "semantics": "cuda",
        "method": method,
        "label": f"{method}[7]",
        "budgets": "equal",
        "against": "lora[7]",
        "definition": "peak_step_bytes",
        "tolerance": 0.02,
        "figure": figure,
        "low": 0.98,
        "high": 1.02,
        "verdict": word,
        "direction": direction,
        "reason": None,
        "evidence": "1 / 2",
    }
    return {**row, **fields}


def card(method, number, **fields):
    row = {
        "case": "case-a",
        "axis": "batch",
        "card_bytes": 24 * 2**30,
        "card": "24 GiB",
        "method": method,
        "label": f"{method}[7]",
        "ours": False,
        "number": number,
        "name": None,
        "longest": False,
        "to_lora": None if number is None else number / 400,
        "reason": None,
    }
    return {**row, **fields}


def budget(method, fits, **fields):
    row = {
        "case": "case-a",
        "method": method,
        "label": f"{method}[7]",
        "ours": False,
        "at_peak_of": "lora[7]",
        "limit_bytes": 100 * MIB,
        "peak_step_bytes": 99 * MIB,
        "fits": fits,
        "budget": 7 if fits else None,
        "budget_params": 700 if fits else None,
        "to_reference": 1.5 if fits else None,
        "status": "ok",
        "reason": None if fits else "no budget fits",
    }
    return {**row, **fields}


def reading(number, word):
    return {
        "number": number,
        "title": f"Title {number}",
        "question": "Is it?",
        "verdict": word,
        "figure": f"figure {number}",
        "sentence": f"Sentence {number}.",
    }


@pytest.fixture
def found():
    return a_claim()


def a_claim():
    """A claim whose readings have the three verdicts, and whose quality was not studied."""
    conditions = [
        {
            "case": "case-a",
            "kind": kind,
            "batch": batch,
            "seq": 128,
            "dtype": "float32",
            "changed": changed,
            "method": "sparsegrad",
            "label": "sparsegrad[7]",
            "peak_step_bytes": 1,
            "lora_peak_step_bytes": 1,
            "to_lora": ratio,
            "reason": None,
        }
        for kind, batch, changed, ratio in (
            ("grid", 8, None, 1.3),
            ("grid", 32, None, 1.1),
            ("variation", 32, "train_rest none", None),
        )
    ]
    return copy.deepcopy(
        {
            "schema_version": 1,
            "claim": "it is so",
            "source": "A paper",
            "verdict": "fails",
            "sentence": "It is not so.",
            "readings": [reading(1, "fails"), reading(2, "undecided"), reading(3, "holds")],
            "quality": {
                "verdict": "undecided",
                "sentence": "quality is not studied yet",
                "studied": False,
                "cases": [],
                "explored": [],
                "arms": [],
                "facts": {},
            },
            "deciding": {"method": "sparsegrad", "definition": "peak_step_bytes", "tolerance": 0.02},
            "tolerances": [0.02],
            "definitions": DEFINITIONS,
            "cases": [
                {
                    "name": "case-a",
                    "batch": 32,
                    "seq": 128,
                    "dtype": "float32",
                    "targets": "mlp",
                    "train_rest": "all",
                    "lora": "lora[7]",
                    "kept": 22000,
                    "note": "A note.",
                }
            ],
            "arithmetic": [{"case": "case-a", "lora": 100, "sparsegrad": 82, "ratio": 0.82, "how": "on 24 layers"}],
            "memory": [
                memory("lora", 1.0),
                memory("sparsegrad", 1.25),
                memory("sparsegrad-core", 0.75),
                memory("full", None, budgets=None),
            ],
            "paper": None,
            "budgets": [budget("lora", True), budget("sparsegrad", False)],
            "cards": [card("lora", 400), card("sparsegrad", 380), card("full", None, reason="batch 2: refused, why")],
            "sensitivity": conditions,
            "turns": [
                {
                    "method": "sparsegrad",
                    "conditions": 2,
                    "below": 0,
                    "least": 1.1,
                    "least_at": "32 x 128",
                    "most": 1.3,
                    "most_at": "8 x 128",
                }
            ],
            "verdicts": [
                verdict(1, "sparsegrad", "fails", "above", 1.25),
                verdict(1, "sparsegrad-core", "fails", "below", 0.75),
                verdict(1, "sparsegrad", "undecided", None, None, against="meprop-weight[7]", reason="not obtained"),
                verdict(3, "sparsegrad", "fails", "below", 0.95, definition="largest batch in 24 GiB"),
            ],
            "limitations": ["It falls short."],
            "environment": {"torch_version": "2.13", "commit": None},
            "quick": False,
        }
    )


def page(found, out):
    return claim.write_page(found, out).read_text()


def text_of(html):
    body = re.sub(r"<style>.*?</style>", "", html, flags=re.S)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", body)))


def test_the_verdict_comes_first_with_the_three_readings(found, tmp_path):
    html = page(found, tmp_path)
    head = html[html.index("<header>") : html.index("</header>")]
    assert "The claim fails" in head
    assert "It is not so." in head
    assert "Not measured: sparsegrad-bench quality --space" in text_of(html)
    for number, word in ((1, "fails"), (2, "undecided"), (3, "holds")):
        assert re.search(rf'<li class="{word}">\s*<h2><a href="#reading-{number}">', head)
        assert f"figure {number}" in head
    assert head.index("It is not so.") < head.index("figure 1")


def test_figures_stand_on_the_page_with_words_and_beside_it(found, tmp_path):
    html = page(found, tmp_path)
    for name in ("memory", "budgets", "cards", "sensitivity"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    assert html.count("<figcaption>") == 4
    alts = re.findall(r'alt="([^"]+)"', html)
    assert len(alts) == 8  # a wide and a narrow rendering of each
    assert any("none fits" in alt for alt in alts)


def test_every_verdict_is_a_word_beside_its_figure(found, tmp_path):
    text = text_of(page(found, tmp_path))
    assert "lora[7] step 1.250 fails above" in text
    assert "meprop-weight[7] step — undecided not obtained" in text
    # MiB stand under the ratio: what needs less is told from what needs more.
    assert "1.250 125.00 above" in text
    assert "0.750 75.00 below" in text
    assert "380 0.950 of LoRA's below" in text


def test_less_memory_and_a_smaller_batch_are_not_the_same_colour(found, tmp_path):
    html = page(found, tmp_path)
    assert '<td class="number better"><strong>0.750</strong>' in html
    assert '<td class="number fails"><strong>380</strong>' in html


def test_what_was_not_obtained_is_a_dash_with_its_reason(found, tmp_path):
    text = text_of(page(found, tmp_path))
    assert "full[7] — batch 2: refused, why" in text
    assert "sparsegrad lora[7]" not in text
    assert "no budget fits" in text


def test_quality_that_was_not_studied_says_so_and_is_no_pass(found, tmp_path):
    text = text_of(page(found, tmp_path))
    assert "Quality: not studied yet" in text
    assert "Quality is not studied yet." in text
    known = {"figure": 0.5, "low": 0.1, "high": 0.9, "p_holm": 0.01, "detectable": 0.3}
    found["quality"] |= {
        "verdict": "holds",
        "sentence": "it is better",
        "studied": True,
        "cases": [
            {**COMPARISON, "case": "a minus b", "verdict": "holds", **known},
            {**COMPARISON, "case": "c minus b", "verdict": "undecided", "reason": "3 of 9 runs are not done"},
        ],
        "explored": [{**COMPARISON, "case": "a minus d", **known, "verdict": None, "peak_ratio": 0.98}],
    }
    text = text_of(page(found, tmp_path))
    assert "Quality: SparseGrad as published against LoRA at as many parameters holds" in text
    assert "not studied yet" not in text
    assert "a minus b the primary endpoint 1.28 +0.50 +0.10 to +0.90 0.0100 0.30 holds" in text
    assert "c minus b 1.28 — — — — undecided 3 of 9 runs are not done" in text
    assert "Outside of the protocol" in text
    assert "a minus d 0.98 +0.50 +0.10 to +0.90" in text


def the_paper():
    """The paper's figures with one definition that has other ratios and one that was not obtained."""
    names = ("full", "lora", "sparsegrad")
    ratios = {"lora/full": 0.702, "sparsegrad/full": 0.755, "sparsegrad/lora": 1.076}
    return {
        "memory_mb": dict(zip(names, (1345.0, 944.0, 1016.0), strict=True)),
        "ratios": ratios,
        "agreement": 0.02,
        "definitions": [
            {"what": "peak_step_bytes", "bytes": dict.fromkeys(names, 3 * MIB), "ratios": ratios, "agrees": False},
            {"what": "counted", "bytes": dict.fromkeys(names, None), "ratios": dict.fromkeys(ratios), "agrees": None},
        ],
        "floors": [{"what": "weights", "bytes": 10**9}, {"what": "moments", "bytes": 1345 * MIB + 1}],
        "by_batch": [{"batch": 16, **dict.fromkeys(names, 1.0)}],
        "finding": "The finding.",
    }


def test_the_papers_numbers_stand_beside_ours(found, tmp_path):
    found["paper"] = the_paper()
    text = text_of(page(found, tmp_path))
    assert "prints 1,345, 944 and 1,016 MB" in text
    assert "7.6 % apart" in text
    assert "step 0.702 3.00 / 3.00 MiB" in text
    assert "counted — — / — MiB" in text
    assert "weights 1,000 953.67 no" in text
    assert "moments 1,410 1,345.00 yes" in text


@pytest.mark.parametrize("quick", [True, False])
def test_the_quick_selection_says_that_it_is(found, tmp_path, quick):
    found.update(quick=quick, sensitivity=[], turns=[])
    text = text_of(page(found, tmp_path))
    assert ("This is the quick selection: case-a alone" in text) is quick
    assert "Not part of the quick selection" in text


def poisoned(value, text=HOSTILE):
    """`value` with `text` for every word that the page does not look up."""
    if isinstance(value, dict):
        kept = ("method", "verdict", "budgets", "kind", "axis", "semantics", "definition", "direction", "status")
        return {name: each if name in kept else poisoned(each, text) for name, each in value.items()}
    if isinstance(value, list):
        return [poisoned(each, text) for each in value]
    return text if isinstance(value, str) else value


def test_what_comes_from_a_file_is_escaped(found, tmp_path):
    found["quality"] |= {"studied": True, "cases": [{**COMPARISON, "case": "x", "verdict": "holds", "reason": "y"}]}
    html = page(poisoned(found), tmp_path)
    assert "<script" not in html
    assert "</td>{{" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "49" not in re.findall(r"alert\(1\)[^a-z]{0,40}", text_of(html))[0]
    assert "default-src 'none'" in html


def test_ids_are_unique_and_links_lead_somewhere(found, tmp_path):
    html = page(found, tmp_path)
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(ids)
    assert set(re.findall(r'aria-labelledby="([^"]+)"', html)) <= set(ids)


def test_a_mark_stands_at_the_ratio_of_its_definition():
    rows = [{**memory("sparsegrad", 1.25), "title": "case-a"}, {**memory("lora", 1.0), "title": "case-a"}]
    rows[0]["to_lora"]["peak_step_bytes"] = None
    (ax,) = figures.draw_ratios("t", rows, list(DEFINITIONS), 0.02).figure.axes
    marks = [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines if line.get_marker() != "None"]
    assert marks == [(1.25, 0)]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["resident", "step"]
    band = ax.patches[0]
    assert (band.get_x(), band.get_width()) == pytest.approx((0.98, 0.04))


def test_bars_are_as_long_as_their_values_and_a_note_stands_for_what_is_missing():
    rows = [
        {"name": "a", "method": "lora", "value": 40, "note": ""},
        {"name": "b", "method": "sparsegrad", "value": None, "note": "none fits"},
    ]
    (ax,) = figures.draw_bars("t", "h", {"g": rows}, "batch").figure.axes
    assert [patch.get_width() for patch in ax.patches] == [40]
    (logged,) = figures.draw_bars("t", "h", {"g": rows}, "batch", log=True).figure.axes
    assert [(patch.get_x(), patch.get_width()) for patch in logged.patches] == [(1, 39)]
    assert "none fits" in [text.get_text() for text in ax.texts]
    assert figures.describe_bars("t", {"g": rows}) == "t, horizontal bars. g: a 40, b none fits."


def test_a_line_joins_the_ratios_of_a_method_by_batch(found):
    grid = [row for row in found["sensitivity"] if row["kind"] == "grid"]
    (ax,) = figures.draw_conditions("t", grid[::-1], 0.02).figure.axes
    lines = [line for line in ax.lines if line.get_marker() != "None"]
    assert [list(zip(*line.get_data(), strict=True)) for line in lines] == [[(8, 1.3), (32, 1.1)]]


@pytest.mark.parametrize("layout", [sheet.WIDE, sheet.NARROW], ids=lambda layout: layout.name)
def test_no_scale_stands_in_a_neighbours_panel(found, layout):
    (row, *_) = (row for row in found["sensitivity"] if row["kind"] == "grid")
    grid = [{**row, "seq": seq, "batch": batch} for seq in (32, 128, 512) for batch in (8, 32, 128)]
    figure = figures.draw_conditions("t", grid, 0.02, layout).figure
    figure.draw_without_rendering()
    panels = [ax.get_window_extent() for ax in figure.axes]
    labels = [
        label.get_window_extent()
        for ax in figure.axes
        for label in ax.get_yticklabels()
        if label.get_text() and label.get_visible()
    ]
    assert labels
    assert not [label for label in labels for panel in panels if label.overlaps(panel)]


def test_counts_have_no_halves_on_their_scale():
    rows = [{"name": "a", "method": "lora", "value": 1, "note": "1"}]
    (ax,) = figures.draw_bars("t", "h", {"g": rows}, "batch").figure.axes
    assert list(ax.get_xticks()) == pytest.approx([round(tick) for tick in ax.get_xticks()])
