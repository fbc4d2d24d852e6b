"""Thresholds: the packaged ones cover the schema, a user's are laid over them, and what has no meaning is refused."""

import json
import typing

import pytest

from reports.compare import IDENTITY, MACHINE
from reports.record import Record
from reports.thresholds import NEVER_BETTER, OF_THE_MACHINE, PARTS, Threshold, ThresholdsError, read_thresholds

# How a figure was obtained, or a part of another.
NO_FIGURES = {
    "matched",
    "touched_steps",
    "timed_rounds",
    "timed_steps",
    "timed_span_s",
    "step_time_ratio_low",
    "step_time_ratio_high",
    "schema_version",
}


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "thresholds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_every_number_of_a_record_has_a_threshold():
    kinds = {name: set(typing.get_args(hint)) or {hint} for name, hint in typing.get_type_hints(Record).items()}
    numbers = {name for name, kind in kinds.items() if kind & {int, float, bool}}
    assert set(read_thresholds()) == numbers - {*IDENTITY, *MACHINE} - NO_FIGURES


def test_what_is_deterministic_is_exact_and_what_is_not_has_a_reason():
    thresholds = read_thresholds()
    exact = {name for name, threshold in thresholds.items() if threshold.rule == "exact"}
    assert {name for name in thresholds if name.endswith("_bytes")} - exact == {
        "kernel_workspace_bytes",
        "preparation_workspace_bytes",
        "process_peak_bytes",
        "nvml_process_bytes",
    }
    assert {name for name in thresholds if name.endswith("_params")} - exact == {"touched_params"}
    assert all(threshold.reason for name, threshold in thresholds.items() if name not in exact)
    # Seconds are no ground for a verdict, ratios are.
    assert {thresholds[name].rule for name in thresholds if name.endswith("_s")} == {"ignore"}
    assert thresholds["step_time_ratio"] == Threshold("interval", 0.1, reason=thresholds["step_time_ratio"].reason)


def test_the_words_about_figures_are_of_figures():
    assert {*NEVER_BETTER, *OF_THE_MACHINE, *PARTS, *PARTS.values()} <= set(read_thresholds())


def test_a_users_file_is_laid_over_the_packaged_thresholds(file):
    path = file({"resident_bytes": {"rule": "tolerance", "absolute": 512}, "step_time_ratio": {"rule": "ignore"}})
    assert read_thresholds(path) == read_thresholds() | {
        "resident_bytes": Threshold("tolerance", absolute=512),
        "step_time_ratio": Threshold("ignore"),
    }


@pytest.mark.parametrize(
    ("relative", "absolute", "old", "new", "allowed"),
    [
        (0, 0, 100, 100, True),
        (0, 0, 2**60, 2**60 + 1, False),  # no float tells these apart
        (0.1, 0, 100, 110, True),
        (0.1, 0, 100, 90, True),
        (0.1, 0, 100, 111, False),
        (0.1, 20, 100, 120, True),  # the larger bound counts
        (0.1, 20, 100, 121, False),
        (0.1, 20, 1000, 1100, True),
        (0.1, 0, 0, 1, False),
    ],
)
def test_how_far_a_figure_may_move(relative, absolute, old, new, allowed):
    assert Threshold("tolerance", relative, absolute).allows(old, new) == allowed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read the thresholds"),
        ("[]", "must hold a JSON object, figure by figure, got list"),
        ({"peak_bytes": {"rule": "exact"}}, "unknown figure 'peak_bytes'; tracked are resident_bytes, peak_forward"),
        ({"step_time_ratio_low": {"rule": "exact"}}, "unknown figure 'step_time_ratio_low'"),
        ('{"fits": {"rule": "exact"}, "fits": {"rule": "ignore"}}', "the key 'fits' stands twice"),
        ({"fits": "exact"}, 'give an object such as {"rule": "exact"}, got \'exact\''),
        ({"fits": {}}, "rule must be one of exact, tolerance, interval, ignore, got None"),
        ({"fits": {"rule": ["exact"]}}, "rule must be one of exact, tolerance, interval, ignore, got ['exact']"),
        (
            {"resident_bytes": {"rule": "exact", "relative": 0.1}},
            "'relative' has no meaning here, exact takes no bound",
        ),
        ({"resident_bytes": {"rule": "tolerance", "percent": 3}}, "tolerance takes relative and absolute"),
        ({"resident_bytes": {"rule": "tolerance"}}, "tolerance needs relative, absolute or both"),
        ({"resident_bytes": {"rule": "tolerance", "relative": 10}}, "a share from 0 to 1, and 0.1 is 10 %, got 10"),
        ({"resident_bytes": {"rule": "tolerance", "absolute": -1}}, "absolute must be a number, 0 or more, got -1"),
        ('{"resident_bytes": {"rule": "tolerance", "absolute": NaN}}', "NaN is no number"),
        ({"resident_bytes": {"rule": "tolerance", "relative": True}}, "relative must be a number, 0 or more, got True"),
        ({"resident_bytes": {"rule": "interval", "relative": 0.1}}, "it has no interval; use tolerance"),
        ({"fits": {"rule": "ignore", "reason": 3}}, "reason must be text, got 3"),
    ],
)
def test_what_has_no_meaning_is_refused(content, message, file):
    with pytest.raises(ThresholdsError) as error:
        read_thresholds(file(content))
    assert message in str(error.value)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ThresholdsError, match=r"cannot read the thresholds .*none\.json"):
        read_thresholds(tmp_path / "none.json")
