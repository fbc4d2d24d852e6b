"""The comparison with a reference: matching, verdicts, environments."""

from dataclasses import replace

import pytest

from reports.compare import (
    CHANGE,
    IDENTITY,
    IMPROVEMENT,
    INCOMPARABLE,
    REGRESSION,
    UNDECIDED,
    EnvironmentChange,
    Missing,
    compare,
    identify,
    name,
)
from reports.record import Record, RecordError
from reports.thresholds import read_thresholds

THRESHOLDS = read_thresholds()
SIZES = {
    "resident_bytes": 500,
    "peak_forward_bytes": 800,
    "peak_backward_bytes": 1000,
    "peak_optimizer_bytes": 700,
    "peak_step_bytes": 1000,
    "parameter_bytes": 300,
    "basis_bytes": 0,
    "optimizer_bytes": 200,
    "gradient_bytes": 100,
    "activation_bytes": 250,
    "temporary_bytes": 150,
}
PREDICTED = Record(
    method="lora",
    budget=7,
    model="minilm-l6",
    batch=16,
    seq=64,
    attention="sdpa",
    calibration_steps=30,
    lr=1e-4,
    source="predicted",
    trainable_params=448,
    state_params=448,
    torch_version="2.13.0+cpu",
    transformers_version="5.17.0",
    commit="a" * 40,
    platform="Linux x86_64",
    python_version="3.11.0",
    created_at="2025-01-01T00:00:00+00:00",
    **SIZES,
)
MEASURED = replace(
    PREDICTED,
    source="measured",
    device_name="AMD EPYC",
    threads=2,
    process_peak_bytes=2**30,
    kernel_workspace_bytes=-3,
    step_time_s=0.4,
    step_time_ratio=1.0,
    step_time_ratio_low=0.95,
    step_time_ratio_high=1.05,
)
ON_A_GPU = replace(MEASURED, device="cuda", device_semantics="cuda", device_name="NVIDIA A100")


def changed(of=MEASURED, policy="refuse", **fields):
    """The comparison of a record with itself, the fields changed."""
    return compare([of], [replace(of, **fields)], THRESHOLDS, policy)


def verdicts(comparison):
    return [(move.figure, move.verdict) for move in comparison.moves]


# --- figures


def test_the_same_records_have_not_moved():
    comparison = compare([PREDICTED, MEASURED], [MEASURED, PREDICTED], THRESHOLDS)
    assert comparison.moves == comparison.missing == comparison.added == comparison.environment == ()
    assert comparison.benchmarks == 2
    # Eleven sizes and two counts in both; the process's peak and the ratio of times besides.
    assert comparison.figures == 13 + 15


@pytest.mark.parametrize("field", [*SIZES, "trainable_params", "state_params"])
def test_one_byte_or_entry_more_is_a_regression(field):
    comparison = changed(PREDICTED, **{field: getattr(PREDICTED, field) + 1})
    assert verdicts(comparison) == [(field, REGRESSION)]
    assert comparison.moves[0].change == 1


@pytest.mark.parametrize(
    ("field", "verdict"),
    [("resident_bytes", IMPROVEMENT), ("state_params", IMPROVEMENT), ("trainable_params", REGRESSION)],
)
def test_less_is_better_but_for_what_a_method_trains(field, verdict):
    assert verdicts(changed(PREDICTED, **{field: 1})) == [(field, verdict)]


def test_a_move_says_what_changed_that_matters_to_its_figure():
    after = {"torch_version": "2.14.0", "device_name": "Intel"}
    moves = changed(policy="warn", peak_step_bytes=7, process_peak_bytes=2**40, **after).moves
    torch, processor = ("torch_version", "2.13.0", "2.14.0"), ("device_name", "AMD EPYC", "Intel")
    assert {move.figure: move.environment for move in moves} == {
        "peak_step_bytes": (torch,),
        "process_peak_bytes": (processor, torch),
    }
    (crashed,) = changed(status="crashed", torch_version=None, device_name="Intel").moves
    assert crashed.environment == (processor,)


def test_a_part_that_grows_while_the_peak_falls_is_no_regression():
    comparison = changed(peak_step_bytes=900, activation_bytes=300, gradient_bytes=0, temporary_bytes=100)
    assert dict(verdicts(comparison)) == {
        "peak_step_bytes": IMPROVEMENT,
        "activation_bytes": CHANGE,
        "gradient_bytes": IMPROVEMENT,
        "temporary_bytes": IMPROVEMENT,
    }


def test_a_part_that_grows_with_the_peak_or_alone_is_a_regression():
    assert set(verdicts(changed(peak_step_bytes=1010, activation_bytes=260))) == {
        ("peak_step_bytes", REGRESSION),
        ("activation_bytes", REGRESSION),
    }
    assert set(verdicts(changed(activation_bytes=260, temporary_bytes=140))) == {
        ("activation_bytes", REGRESSION),
        ("temporary_bytes", IMPROVEMENT),
    }


@pytest.mark.parametrize(("old", "new", "verdict"), [(True, False, REGRESSION), (False, True, IMPROVEMENT)])
def test_what_no_longer_fits_is_a_regression(old, new, verdict):
    of = replace(PREDICTED, device_semantics="cuda", gpu_memory_bytes=2**34, fits=old)
    assert verdicts(changed(of, fits=new)) == [("fits", verdict)]


def test_a_figure_that_is_no_longer_obtained_is_a_regression():
    comparison = changed(step_time_ratio=None, step_time_ratio_low=None, step_time_ratio_high=None)
    assert verdicts(comparison) == [("step_time_ratio", REGRESSION)]
    assert comparison.moves[0].note == "no longer obtained"
    assert comparison.lost == comparison.moves


def test_a_figure_that_was_not_obtained_before_is_a_change():
    assert verdicts(changed(peak_eval_bytes=5)) == [("peak_eval_bytes", CHANGE)]


def test_what_hangs_on_the_moment_is_ignored():
    moved = {"kernel_workspace_bytes": 10**9, "step_time_s": 4.0, "loss_last": 7.0}
    assert changed(**moved).moves == ()


@pytest.mark.parametrize(
    ("more_bytes", "beyond"), [(2**30 // 10, False), (2**30 // 10 + 1, True), (-(2**30 // 10) - 1, True)]
)
def test_the_process_peak_has_a_tolerance_of_a_tenth(more_bytes, beyond):
    comparison = changed(process_peak_bytes=2**30 + more_bytes)
    assert bool(comparison.moves) == beyond


# --- times


@pytest.mark.parametrize(
    ("ratio", "low", "high", "expected"),
    [
        (1.3, 1.25, 1.35, REGRESSION),
        (1.3, 1.05, 1.5, None),  # the intervals touch
        (1.3, 1.06, 1.5, REGRESSION),
        (1.1, 1.08, 1.12, None),  # wholly above, and no more than a tenth
        (0.7, 0.68, 0.72, IMPROVEMENT),
        (0.7, 0.5, 0.95, None),
        (0.91, 0.9, 0.92, None),  # 1.0 is less than a tenth more
        (1.3, None, None, UNDECIDED),
        (1.05, None, None, None),
    ],
)
def test_a_time_moved_where_its_interval_did_and_by_a_tenth(ratio, low, high, expected):
    comparison = changed(step_time_ratio=ratio, step_time_ratio_low=low, step_time_ratio_high=high)
    assert verdicts(comparison) == ([] if expected is None else [("step_time_ratio", expected)])


# --- statuses


@pytest.mark.parametrize("status", ["oom", "killed", "crashed", "timeout", "diverged", "refused"])
def test_a_run_that_no_longer_ends_ok_is_a_regression_and_is_named(status):
    lost = Record(**{name: getattr(MEASURED, name) for name in CONFIGURATION}, status=status, reason="why")
    comparison = compare([MEASURED], [lost], THRESHOLDS)
    (move,) = comparison.moves
    assert (move.figure, move.old, move.new, move.verdict, move.note) == ("status", "ok", status, REGRESSION, "why")
    assert comparison.lost == (move,)


CONFIGURATION = ("method", "budget", "model", "batch", "seq", "attention", "calibration_steps", "lr", "source")


def test_refused_on_both_sides_is_fine():
    refused = replace(PREDICTED, status="refused", reason="values")
    assert compare([refused], [replace(refused, reason="other values")], THRESHOLDS).moves == ()


@pytest.mark.parametrize(("status", "verdict"), [("ok", IMPROVEMENT), ("crashed", CHANGE)])
def test_a_run_that_did_not_end_ok_before(status, verdict):
    refused = replace(PREDICTED, status="refused", reason="values")
    assert verdicts(compare([refused], [replace(refused, status=status)], THRESHOLDS)) == [("status", verdict)]


# --- matching


def test_benchmarks_are_matched_by_what_they_are():
    others = [
        replace(PREDICTED, **{field: value}, peak_step_bytes=place)
        for place, (field, value) in enumerate(
            [
                ("method", "full"),
                ("budget", 8),
                ("model", "roberta-base"),
                ("batch", 8),
                ("seq", 32),
                ("dtype", "bfloat16"),
                ("attention", "eager"),
                ("optimizer_impl", "fused"),
                ("train_rest", "none"),
                ("targets", "attention"),
                ("data", "movie"),
                ("adapter_dtype", "float32"),
                ("checkpointing", True),
                ("seed", 1),
                ("lr", 1e-3),
                ("device_semantics", "cuda"),
                ("source", "measured"),
                ("gpu", "t4"),
                ("gpu_memory_bytes", 2**34),
                ("calibration_steps", 5),
                ("equal_trainable", "lora[7]"),
                ("equal_memory", "lora[7] peak_step_bytes"),
            ]
        )
    ]
    comparison = compare([PREDICTED, *others], [*reversed(others), PREDICTED], THRESHOLDS)
    assert (comparison.benchmarks, comparison.moves, comparison.missing) == (23, (), ())


def test_a_density_of_one_is_not_a_count_of_one():
    count, density = (replace(PREDICTED, method="sparsegrad", budget=budget) for budget in (1, 1.0))
    assert identify(count) != identify(density)
    assert compare([count, density], [density, count], THRESHOLDS).benchmarks == 2


@pytest.mark.parametrize("twice", ["reference", "new"])
def test_a_benchmark_given_twice_is_an_error(twice):
    again = replace(PREDICTED, peak_step_bytes=1)
    sides = {"reference": [PREDICTED], "new": [PREDICTED], twice: [PREDICTED, again]}
    whose = {"reference": "the reference", "new": "the new results"}[twice]
    with pytest.raises(RecordError, match=rf"{whose}: a benchmark is there twice, .*: lora\[7\] on minilm-l6"):
        compare(sides["reference"], sides["new"], THRESHOLDS)


def test_missing_and_new_benchmarks_and_what_is_there_instead():
    full, other = replace(PREDICTED, method="full", budget=None), replace(PREDICTED, budget=8)
    comparison = compare([PREDICTED, full], [other], THRESHOLDS)
    assert comparison.missing == (
        Missing(identify(PREDICTED), (("budget", "7", "8"),)),
        Missing(identify(full)),
    )
    assert comparison.added == (identify(other),)
    assert not comparison.incomparable


@pytest.mark.parametrize("fields", [{"device_semantics": "cuda", "optimizer_impl": "foreach"}, {"source": "measured"}])
def test_other_conditions_are_not_comparable_and_not_missing(fields):
    comparison = changed(PREDICTED, **fields)
    assert comparison.missing == comparison.added == ()
    assert comparison.incomparable
    ((told, *_),) = [each.instead for each in comparison.elsewhere]
    assert told[0] in fields


# --- environments


def test_commit_processor_and_build_do_not_matter_to_predictions():
    elsewhere = {
        "commit": "b" * 40,
        "device_name": "Intel Xeon",
        "threads": 64,
        "platform": "Darwin arm64",
        "python_version": "3.13.1",
        "created_at": None,
        "torch_version": "2.13.0+cu130",
    }
    assert changed(PREDICTED, **elsewhere).environment == ()
    # A workload without transformers says its version where another one has imported it.
    assert changed(PREDICTED, transformers_version=None).environment == ()


@pytest.mark.parametrize(
    ("of", "field", "value", "everything"),
    [
        (PREDICTED, "torch_version", "2.14.0+cpu", True),
        (PREDICTED, "transformers_version", "5.18.0", True),
        (MEASURED, "torch_version", "2.14.0+cpu", True),
        (MEASURED, "device_name", "Intel Xeon", False),
        (MEASURED, "threads", 4, False),
        (MEASURED, "platform", "Linux aarch64", False),
        (MEASURED, "allocator", "MALLOC_ARENA_MAX=1", False),
        (ON_A_GPU, "device_name", "Tesla T4", True),
        (ON_A_GPU, "driver", "580.65.06", True),
        (ON_A_GPU, "torch_version", "2.13.0+cu130", True),
    ],
)
def test_what_matters_to_which_figures(of, field, value, everything):
    comparison = changed(of, **{field: value})
    old, new = getattr(of, field), value
    if field == "torch_version" and of is not ON_A_GPU:
        old, new = "2.13.0", "2.14.0"  # without the build
    assert comparison.environment == (EnvironmentChange(field, old, new, 1, everything),)
    assert comparison.incomparable


def test_where_no_time_is_compared_the_processor_does_not_matter():
    without = {field: None for field in ("step_time_ratio", "process_peak_bytes")}
    comparison = compare(
        [replace(MEASURED, **without)], [replace(MEASURED, **without, device_name="Intel Xeon")], THRESHOLDS
    )
    assert comparison.environment == ()


SLOWER = {"step_time_ratio": 1.5, "step_time_ratio_low": 1.4, "step_time_ratio_high": 1.6}


@pytest.mark.parametrize(
    ("policy", "verdict", "incomparable", "said"),
    [("refuse", INCOMPARABLE, True, 1), ("warn", REGRESSION, False, 1), ("ignore", REGRESSION, False, 0)],
)
def test_what_is_made_of_another_machine(policy, verdict, incomparable, said):
    comparison = changed(MEASURED, policy, device_name="Intel Xeon", resident_bytes=501, **SLOWER)
    # Bytes are the same on every processor: theirs is a regression under any policy.
    assert dict(verdicts(comparison)) == {"step_time_ratio": verdict, "resident_bytes": REGRESSION}
    assert comparison.incomparable == incomparable
    assert len(comparison.environment) == said


def test_another_version_of_torch_leaves_no_figure_to_judge():
    comparison = changed(torch_version="2.14.0", resident_bytes=501, **SLOWER)
    assert {move.verdict for move in comparison.moves} == {INCOMPARABLE}
    assert {move.note for move in comparison.moves} == {"torch_version changed"}


# --- order and names


def test_the_most_severe_comes_first():
    records = [replace(MEASURED, seed=seed) for seed in range(6)]
    new = [
        replace(records[0], resident_bytes=400),
        replace(records[1], resident_bytes=510),
        replace(records[2], step_time_ratio=None),
        replace(records[3], status="oom"),
        replace(records[4], resident_bytes=600),
        replace(records[5], basis_bytes=1),
    ]
    comparison = compare(records, new, THRESHOLDS)
    # A run lost, a figure lost, then by the share: of nothing, a fifth, a fiftieth; what is better comes last.
    assert [move.benchmark[IDENTITY.index("seed")] for move in comparison.moves] == [3, 2, 5, 4, 1, 0]


def test_a_name_is_the_same_in_any_company_unless_it_is_shortened():
    one, other = identify(PREDICTED), identify(replace(PREDICTED, seed=3, method="full", budget=None))
    assert (
        name(one)
        == "lora[7] on minilm-l6, 16 x 64, float32, predicted, attention sdpa, calibration_steps 30, lr 0.0001"
    )
    assert name(other, [one, other]) == "full on minilm-l6, 16 x 64, float32, seed 3"
    assert name(one, [one, other]) == "lora[7] on minilm-l6, 16 x 64, float32, seed 0"
