"""The page of formulas is what the methods say."""

from pathlib import Path

import torch

from baselines.registry import methods
from benchmarks import formulas

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"


def test_the_page_is_made_of_the_methods_own_formulas():
    assert PAGE.read_text() == formulas.text(), "run python -m benchmarks.formulas > docs/methods.md"


def test_every_method_has_a_line():
    lines = [line for line in formulas.text().splitlines() if line.startswith("| `")]
    assert [line.split("`")[1].partition("[")[0] for line in lines] == list(methods())
    # Eight cells each, whatever a method says of itself.
    assert {line.count(" | ") for line in lines} == {7}


def test_the_figures_are_the_closed_forms():
    by_name = {line.split("`")[1]: line for line in formulas.text().splitlines() if line.startswith("| `")}
    weight = 3072 * 768 * 4 / 2**20
    own = 7 * (3072 + 768) * 4 / 2**20
    cells = [cell.strip() for cell in by_name["lora[7]"].split(" | ")]
    assert cells[2:5] == [f"{weight + own:.3f}", f"{own:.3f}", f"{2 * own:.3f}"]
    assert formulas.DTYPE == torch.float32
    full = [cell.strip() for cell in by_name["full"].split(" | ")]
    assert full[2:6] == [f"{weight:.3f}", f"{weight:.3f}", f"{2 * weight:.3f}", "0"]
