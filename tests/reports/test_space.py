"""The section on the sparse space: lines stand where the rows say, and tables hold their numbers."""

import re

import pytest
from matplotlib.colors import to_hex

from reports import sheet, space
from reports.figures import space as figures

DENSITIES = [0.001, 0.01, 0.1]


def energy(kind, name, layer, kept, training="none", step=0):
    where = {"task": "trec", "training": training, "step": step, "kind": kind, "layer": layer, "space": name}
    return {**where, "kept": kept}


ROWS = [
    *(energy("up", "basis", n, kept) for n, kept in ((1, [0.2, 0.4, 0.6]), (2, [0.4, 0.8, 1.0]))),
    *(energy("up", "raw", n, [0.1, 0.2, 0.3]) for n in (1, 2)),
    *(energy("up", "random", n, [0.01, 0.05, 0.2]) for n in (1, 2)),
    *(energy("up", "raw", n, [0.1, 0.5, 0.6], "full", 8) for n in (1, 2)),
    *(energy("up", "basis", n, [0.1, 0.3, 0.6], "full", 8) for n in (1, 2)),
    *(energy("up", "basis made anew", n, [0.1, 0.7, 0.8], "full", 8) for n in (1, 2)),
]
START = [row for row in ROWS if row["training"] == "none"]


def kind(training, step, ratio, anew):
    shares = {"basis": 0.6, "raw": 0.2, "random": 0.05}
    where = {"task": "trec", "training": training, "step": step, "kind": "up"}
    return {**where, "shares": shares, "ratio": ratio, "anew": anew, "least": 2.0, "most": 4.0}


def target(training, step, ratio, met, anew=None, anew_meets=None):
    where = {"task": "trec", "training": training, "step": step}
    return {**where, "ratio": ratio, "met": met, "anew": anew, "anew_meets": anew_meets}


def counted(padded, tokens, padding, zero, **fields):
    where = {"task": "trec", "training": "none", "step": 0, "padded": padded, "layer": 1}
    counts = {"tokens": tokens, "padding": padding, "zero": zero, "zero_padding": padding}
    return {**where, **counts, "kind": "up", "below_1_pct": 8, "below_10_pct": 16, **fields}


@pytest.fixture
def found():
    return a_space()


def a_space():
    """What `claim.json` holds of a measurement of two layers of one kind."""
    return {
        "premise": "few matter",
        "settings": {
            **{"model": "m", "train_size": 300, "batch": 16, "longest": 64, "padded_to": 128, "calibration_steps": 30},
            **{"held_out_batches": 4, "train_rest": "none", "density": 0.01, "seed": 0, "steps": {"trec": 8}},
            "learning_rates": {"full": 1e-4},
        },
        "environment": dict.fromkeys(
            ("created_at", "commit", "torch_version", "transformers_version", "device_name", "threads")
        ),
        "densities": DENSITIES,
        "density": 0.01,
        "energy": ROWS,
        "zero_rows": [
            counted("to the longest text", 100, 20, 60),
            counted("to the longest text", 100, 20, 60, kind="down", below_1_pct=0, below_10_pct=0),
            counted("to 128 tokens", 200, 120, 160),
        ],
        "kinds": [kind("none", 0, 3.0, None), kind("full", 8, 0.6, 1.4)],
        "targets": [target("none", 0, 3.0, True), target("full", 8, 0.6, False, 1.4, True)],
        "sentence": "It does.",
        "findings": ["One.", "Two."],
    }


def lines(ax):
    """Label by colour -> the points of each line."""
    names = {to_hex(colour): name for name, (colour, _, _) in figures.LOOKS.items()}
    return {names[to_hex(line.get_color())]: list(zip(*line.get_data(), strict=True)) for line in ax.lines}


@pytest.mark.parametrize("layout", [sheet.WIDE, sheet.NARROW])
def test_a_line_is_the_mean_over_layers_and_a_band_their_range(layout):
    (ax,) = figures.draw_energy("t", START, DENSITIES, layout).figure.axes
    drawn = lines(ax)
    assert set(drawn) == {"basis", "raw", "random"}
    assert drawn["basis"] == [pytest.approx(point) for point in zip(DENSITIES, [0.3, 0.6, 0.8], strict=True)]
    assert ax.get_xscale() == "log"
    basis_band, raw_band = (band.get_paths()[0].vertices for band in ax.collections)
    at_one_per_cent = sorted({y for x, y in basis_band if x == 0.01})
    assert at_one_per_cent == pytest.approx([0.4, 0.8])
    assert {y for x, y in raw_band if x == 0.01} == {0.2}


def test_all_lines_of_training_begin_where_nothing_was_trained():
    (ax,) = figures.draw_ageing("t", ROWS, 1).figure.axes
    drawn = lines(ax)
    assert drawn["basis"] == [pytest.approx(point) for point in ((0, 0.6), (8, 0.3))]
    assert drawn["basis made anew"] == [pytest.approx(point) for point in ((0, 0.6), (8, 0.7))]
    assert drawn["raw"] == [pytest.approx(point) for point in ((0, 0.2), (8, 0.5))]
    assert "in the bases made at the start from 60 to 30 %" in figures.describe_ageing(ROWS, 1)


def test_words_say_the_means_at_the_density_that_counts():
    said = figures.describe_energy(START, DENSITIES, 0.01)
    assert "from 0.1 to 10 %. At 1 %, trec, up: basis 60 %, raw 20 %, random 5 %." in said


def texts(table):
    return [[cell.text for cell in cells] for _, cells in table.rows]


def test_tables_hold_the_numbers_and_the_target(found, tmp_path):
    section = space.section(found, tmp_path)
    assert texts(section.kinds) == [
        ["trec, up", "60 %", "20 %", "5 %", "3.00"],
        ["trec, mean of the kinds", "", "", "", "3.00"],
    ]
    assert section.kinds.rows[-1][1][-1].small == "target met"
    assert texts(section.ages) == [
        ["trec", "", "0", "3.00", "3.00", "", ""],
        ["trec", "full", "8", "0.60", "0.60", "1.40", "1.40"],
    ]
    assert [cell.small for cell in section.ages.rows[1][1][4:]] == ["target missed", "", "target met"]
    assert texts(section.layers) == [["trec, up 1", "40 %", "20 %", "5 %"], ["trec, up 2", "80 %", "20 %", "5 %"]]
    # Both kinds together: of 160 rows of text 80 are zero, 8 at most 1 % of the largest, 16 at most 10 %.
    assert texts(section.rows) == [["trec, 1", "20 %", "60 %", "60 %", "80 %", "50 %", "55 %", "60 %"]]
    for name in ("space-energy.png", "space-training.png"):
        assert (tmp_path / name).stat().st_size > 1000


def test_without_training_there_is_no_figure_of_it(found, tmp_path):
    found |= {"energy": START, "kinds": found["kinds"][:1], "targets": found["targets"][:1]}
    assert space.section(found, tmp_path).ageing is None
    assert not (tmp_path / "space-training.png").exists()


def test_what_was_not_measured_has_no_section(tmp_path):
    assert space.section(None, tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_the_look_of_a_space_is_its_own():
    looks = list(figures.LOOKS.values())
    assert len({colour for colour, _, _ in looks}) == len({marker for _, marker, _ in looks}) == len(looks)
    assert set(figures.NAMES) <= set(figures.LOOKS)
    assert not any(re.search(r"[<>]", name) for name in figures.NAMES.values())
