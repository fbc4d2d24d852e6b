"""The quality study on the claim's page: what is known is shown, and what is not is said to be missing."""

import re
from html import unescape

import pytest

from reports import quality, sheet
from reports.figures import quality as figures

MIB = 2**20
HOSTILE = "<script>alert(1)</script>"


def on_task(task, scores, **fields):
    row = {
        "task": task,
        "metric": "accuracy" if task == "questions" else "pearson",
        "score": sum(scores) / len(scores) if scores else None,
        "scores": dict(enumerate(scores)),
        "lr": 1e-3 if scores else None,
        "lr_at_edge": False,
        "losses": [1.5, 0.5] if scores else [],
        "reached": 0,
        "steps_to_target": None,
    }
    return row | fields


def arm(name, peak_mib, mean, matched="parameters", **fields):
    row = {
        "arm": name,
        "method": name.removesuffix("@peak"),
        "label": f"{name.removesuffix('@peak')}[7]",
        "matched": matched,
        "trainable_params": 1234,
        "peak_step_bytes": peak_mib * MIB,
        "mean": mean,
        "low": None if mean is None else mean - 1,
        "high": None if mean is None else mean + 1,
        "tasks": [
            on_task("questions", [] if mean is None else [mean - 2, mean + 4]),
            on_task("ratings", [] if mean is None else [mean - 3, mean + 1]),
        ],
    }
    return row | fields


def comparison(first, second, verdict, figure, **fields):
    row = {
        "first": first,
        "second": second,
        "case": f"{first} minus {second}",
        "verdict": verdict,
        "peak_ratio": 1.284,
        "figure": figure,
        "low": None if figure is None else figure - 0.5,
        "high": None if figure is None else figure + 0.5,
        "unit": "points",
        "p_holm": None,
        "detectable": None if figure is None else 0.8,
        "seeds_to_decide": None,
        "equivalent": None if figure is None else False,
        "per_task": [] if figure is None else [{"task": "questions", "difference": figure, "low": -9.0, "high": 9.0}],
        "without": None,
        "reason": None,
    }
    return row | fields


FACTS = {
    "protocol": 7,
    "model": "encoder",
    "train_size": 300,
    "epochs": 8,
    "batch": 16,
    "longest": 64,
    "train_rest": "none",
    "seeds": 2,
    "runs": 1000,
    "planned": 2000,
    "failed": 3,
    "hours": 1.25,
}


@pytest.fixture
def study():
    return a_study()


def a_study():
    """Five arms, one of which has not run."""
    return {
        "verdict": "fails",
        "sentence": "s",
        "studied": True,
        "cases": [
            comparison("core@peak", "lora", "undecided", -0.25, seeds_to_decide=40),
            comparison("full", "lora", "holds", 3.0, p_holm=0.01, without={"task": "ratings", "figure": -0.5}),
            comparison("late", "lora", "undecided", None, reason="4 of 4 runs are not done"),
        ],
        "explored": [
            comparison("core@peak", "full", None, -1.5),
            comparison("core@peak", "late", None, None, reason="4 of 4 runs are not done"),
        ],
        "arms": [
            arm("lora", 100, 70.0),
            arm("core@peak", 100, 69.0, "peak"),
            arm("full", 200, 73.0, "none"),
            arm("head", 50, 20.0, "none"),
            arm("late", 90, None),
        ],
        "facts": FACTS,
    }


def rows(table):
    return {
        cells[0].text: [" ".join(filter(None, (c.text, c.small))).strip() for c in cells[1:]] for _, cells in table.rows
    }


def test_comparisons_with_what_would_decide_them(study, tmp_path):
    table = quality.section(study, tmp_path).comparisons
    assert rows(table) == {
        "core@peak minus lora": [
            "1.28",
            "-0.25",
            "-0.75 to +0.25",
            "—",
            "0.80",
            "undecided about 40 seeds would decide it",
        ],
        "full minus lora": ["1.28", "+3.00 -0.50 without ratings", "+2.50 to +3.50", "0.0100", "0.80", "holds"],
        "late minus lora": ["1.28", "—", "—", "—", "—", "undecided 4 of 4 runs are not done"],
    }
    assert [cells[0].small for _, cells in table.rows] == ["the primary endpoint", "", ""]


def test_what_is_outside_of_the_protocol_stands_apart_and_has_no_verdict(study, tmp_path):
    table = quality.section(study, tmp_path).explored
    assert "no verdict" in table.caption
    assert rows(table) == {
        "core@peak minus full": ["1.28", "-1.50", "-2.00 to -1.00"],
        "core@peak minus late": ["1.28", "—", "—"],
    }
    assert [cells[0].small for _, cells in table.rows] == ["", "4 of 4 runs are not done"]


def test_scores_with_their_rates(study, tmp_path):
    study["arms"][0]["tasks"][0]["lr_at_edge"] = True
    table = quality.section(study, tmp_path).scores
    assert table.headings == [
        "arm",
        "peak of a step, MiB",
        "trainable, head included",
        "questions",
        "ratings",
        "mean, 95 % interval",
    ]
    found = rows(table)
    edge = "71.0 learning rate 0.001, the edge of what was tried"
    assert found["lora"] == ["100.00", "1,234", edge, "69.0 learning rate 0.001", "70.0 69.0 to 71.0"]
    assert found["late"] == ["90.00", "1,234", "—", "—", "—"]


def test_steps_to_the_target(study, tmp_path):
    study["arms"][0]["tasks"][0] |= {"reached": 1, "steps_to_target": 30}
    found = rows(quality.section(study, tmp_path).learning)
    assert found["lora"][0] == "30 reached by 1 of 2 runs"
    assert found["full"] == ["not reached reached by 0 of 2 runs"] * 2
    assert found["late"] == ["—", "—"]


def test_how_the_study_was_run(study, tmp_path):
    facts = quality.section(study, tmp_path).facts
    assert "300 training examples" in facts
    assert "protocol 7" in facts
    assert "1,000 of 2,000 runs are done, 1.2 hours; 3 failed." in facts


def test_differences_by_task(study, tmp_path):
    found = rows(quality.section(study, tmp_path).per_task)
    assert found == {
        "core@peak minus lora": ["-0.25 -9.00 to +9.00"],
        "full minus lora": ["+3.00 -9.00 to +9.00"],
        "core@peak minus full": ["-1.50 -9.00 to +9.00"],
    }


def test_no_study_has_nothing_to_show(tmp_path):
    nothing = {
        "verdict": "undecided",
        "sentence": "s",
        "studied": False,
        "cases": [],
        "explored": [],
        "arms": [],
        "facts": {},
    }
    shown = quality.section(nothing, tmp_path)
    assert (shown.facts, shown.figures, shown.comparisons, shown.explored, shown.scores) == ("", [], None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_a_study_without_a_final_run_has_no_figure(study, tmp_path):
    study["arms"] = [study["arms"][-1]]
    shown = quality.section(study, tmp_path)
    assert shown.figures == []
    assert shown.learning is None
    assert rows(shown.scores)["late"][2:] == ["—", "—", "—"]


# --- figures


def test_the_front_has_no_arm_that_another_beats_in_both():
    def front(*arms):
        return [each["arm"] for each in figures.front([arm(*each) for each in arms])]

    assert front(("a", 100, 70.0), ("b", 90, 60.0), ("c", 95, 55.0), ("d", 200, 69.0)) == ["b", "a"]
    assert front(("a", 100, 70.0), ("b", 100, 71.0)) == ["b"]
    assert front(("a", 100, 70.0), ("b", 120, 70.0)) == ["a"]
    assert front(("a", 100, None), ("b", 120, 70.0)) == ["b"]


def test_arms_of_one_peak_stand_side_by_side(study):
    places = figures._places(study["arms"][:4])
    lora, core, full, head = places
    assert lora != core
    assert (lora + core) / 2 == pytest.approx(100)
    assert (full, head) == (200, 50)


@pytest.mark.parametrize("layout", [sheet.WIDE, sheet.NARROW], ids=lambda layout: layout.name)
def test_an_arm_far_below_is_named_at_the_edge(study, layout):
    drawing = figures.draw_scores("t", study["arms"], layout)
    (ax,) = drawing.figure.axes
    assert [text.get_text() for text in ax.texts] == ["↓ head 20.0"]
    assert 60 < ax.get_ylim()[0] < 68
    # The front begins at LoRA, since the head is not on the scale, and rises to full fine-tuning at its peak.
    front = next(line for line in ax.lines if len(line.get_xdata()) > 2)
    assert list(zip(front.get_xdata(), front.get_ydata(), strict=True))[:3] == [(100, 70.0), (200, 70.0), (200, 73.0)]
    bars = [list(line.get_ydata()) for line in ax.lines if len(line.get_xdata()) == 2]
    assert sorted(bars) == [[68.0, 70.0], [69.0, 71.0], [72.0, 74.0]]


def test_bars_reach_from_the_lowest_to_the_highest_seed_also_of_the_lowest_arm(study):
    drawing = figures.draw_tasks("t", study["arms"])
    questions, ratings = drawing.figure.axes
    bars = [tuple(line.get_ydata()) for line in questions.lines if len(line.get_xdata()) == 2]
    assert sorted(bars) == [(67.0, 73.0), (68.0, 74.0), (71.0, 77.0)]
    low, high = ratings.get_ylim()
    assert low < 66.0  # the lowest seed of the lowest arm, 69 - 3, is on the scale
    assert high > 74.0


def test_a_small_difference_in_memory_looks_small(study):
    study["arms"] = [arm("lora", 100, 70.0), arm("core@peak", 100, 69.0, "peak", peak_step_bytes=100 * MIB + 9)]
    for draw in (figures.draw_scores, figures.draw_tasks):
        ax = draw("t", study["arms"]).figure.axes[0]
        left, right = ax.get_xlim()
        assert right - left >= 40
        assert left < 95
        marks = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 1]
        assert 0 < abs(marks[0] - marks[1]) < 0.05 * (right - left)


def test_an_arm_whose_runs_are_not_all_done_is_in_no_figure(study, tmp_path):
    study["arms"][4]["tasks"][0] |= {"scores": {0: 99.0}, "score": 99.0, "lr": 1e-3, "losses": [1.0, 0.5]}
    shown = quality.section(study, tmp_path)
    assert not any("late" in illustration.alt for illustration in shown.figures)
    (cells,) = [cells for _, cells in shown.scores.rows if cells[0].text == "late"]
    assert (cells[3].text, cells[3].note) == ("99.0", "1 seed so far")


def test_words_for_each_figure(study, tmp_path):
    shown = quality.section(study, tmp_path)
    scores, tasks, losses = (illustration.alt for illustration in shown.figures)
    assert "head at 50 MiB 20.0 (19.0 to 21.0); lora at 100 MiB 70.0" in scores
    assert "On the Pareto front: head, lora, full." in scores
    assert "questions: lora 71.0, core@peak 70.0, full 74.0, head 21.0; ratings: lora 69.0" in tasks
    assert "questions: lora 0.50, core@peak 0.50" in losses
    for name in ("quality", "quality-tasks", "quality-losses"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_names_from_a_file_are_drawn_as_they_are(study, tmp_path):
    study["arms"][0] |= {"arm": HOSTILE + "$x^2$", "method": HOSTILE}
    shown = quality.section(study, tmp_path)
    images = "".join(image.uri for each in shown.figures for image in each.images)
    assert "<script" not in unescape(images)
    assert re.search(r"\$x\^2\$", shown.figures[0].alt)
