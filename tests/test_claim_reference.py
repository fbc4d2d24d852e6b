"""The committed tables of the claim: the README prints their figures, and the verdicts on them are today's rules'."""

import csv
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.claim.verdict import FAILS, judge
from benchmarks.validation import H100
from reports.record import read

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "benchmarks/reference/claim"


def table(name):
    with (TABLES / f"{name}.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def section():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return readme.split("## The claim on trial")[1].split("\n## ")[0]


def test_the_readme_prints_the_peaks_of_the_table(section):
    ratios = {
        (row["case"], row["method"]): float(row["peak_step_bytes_to_lora"])
        for row in table("memory")
        if row["semantics"] == "cuda" and row["budgets"] == "equal"
    }
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    heading, *rows = [[cell.strip(" `") for cell in line] for line in lines]
    methods = [f"sparsegrad{name}" if name.startswith("-") else name for name in heading[1:]]
    found = measured_ratios()
    assert [case.partition(",")[2] == " measured" for case, *_ in rows] == [False, True, False, True, False]
    for case, *cells in rows:
        model, _, how = case.partition(", ")
        of = found if how == "measured" else ratios
        figures = [of.get((model, method)) for method in methods]
        assert cells == ["not run" if figure is None else f"{figure:.3f}" for figure in figures]
        # The committed predictions are of an A100, whose workspaces of cuBLAS are smaller than an H100's.
        assert all(abs(ratios[key] - found[key]) < 0.005 for key in found if key[1] in methods)


def measured_ratios():
    """(model, method) -> the peak of a step, by LoRA's, of the paper's cases that were measured."""
    records = [
        record
        for record in read(H100)
        if record.model in ("roberta-base", "roberta-large")
        and (record.dtype, record.attention, record.train_rest) == ("float32", "sdpa", "all")
        and (record.optimizer, record.optimizer_impl) == ("adamw", "foreach")
        and (record.checkpointing, record.accumulate) == (False, 1)
    ]
    peaks = {(record.model, record.method): record.peak_step_bytes for record in records}
    assert len(peaks) == len(records)
    return {key: peak / peaks[key[0], "lora"] for key, peak in peaks.items()}


def test_sparsegrad_as_published_fails_by_the_table_as_the_readme_says(section):
    assert "**The claim fails**" in section
    for row in table("memory"):
        if row["method"] == "sparsegrad":
            assert judge(float(row["peak_step_bytes_to_lora"]), 0.02).verdict == FAILS


def test_the_readme_counts_the_cards_of_the_table(section):
    cards = {(row["case"], row["axis"], row["card"], row["method"]): row for row in table("cards")}
    found = Counter()
    for (*where, method), row in cards.items():
        if method == "sparsegrad":
            rival = cards[(*where, "lora")]
            number, most = int(row["number"]), int(row["most"])
            of_lora, most_of_lora = int(rival["number"]), int(rival["most"])
            interval = (number / most_of_lora, most / of_lora) if number else None
            judgement = judge(float(row["to_lora"]), 0.02, interval)
            found[judgement.direction or judgement.verdict] += 1
    words = " ".join(section.split())
    assert f"of {found.total()} largest batches, sequences and models" in words
    assert f"fits less than LoRA in {found['below']}, as much in {found['equal']}, more in none (one is" in words
    assert (found["above"], found["undecided"]) == (0, 1)
    largest = {
        row["method"]: row["number"]
        for row in table("cards")
        if (row["case"], row["axis"], row["card"]) == ("llama-2-7b", "batch", "24 GiB")
    }
    assert f"a batch of {largest['sparsegrad']} where LoRA has {largest['lora']}." in words
