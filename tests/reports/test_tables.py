from dataclasses import replace
from fractions import Fraction

import pytest

from reports import tables
from reports.record import COUNTS, PEAKS, STATUSES, Record

MIB = 2**20
LORA = Record(
    method="lora",
    model="layer 7x13",
    budget=7,
    matched=True,
    batch=1,
    seq=17,
    resident_bytes=10 * MIB,
    peak_step_bytes=30 * MIB,
    step_time_s=0.25,
    budget_params=1234567,
)
FULL = replace(LORA, method="full", budget=None, matched=False, peak_step_bytes=120 * MIB, step_time_s=0.5)
SPARSE = replace(LORA, method="sparsegrad", budget=0.01, peak_step_bytes=60 * MIB, step_time_s=None)


def shown(table: tables.Table, row: int) -> dict[tuple[str, str], str]:
    keys = [(column.group.split(",")[0], column.heading.replace("\u00a0", " ")) for column in table.columns]
    return dict(zip(keys, [cell.text for cell in table.rows[row].cells], strict=True))


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, tables.MISSING),
        (0, "0"),
        (MIB, "1.00"),
        (3 * MIB // 2, "1.50"),
        (1234 * MIB, "1,234.00"),
        (1, "<0.01"),
        (-MIB, "-1.00"),
        (-1, ">-0.01"),
        (MIB * 10**20, "≈10^20.0"),
        (MIB * 10**400, "≈10^400.0"),
    ],
)
def test_mib(size, text):
    assert tables.mib(size) == text


@pytest.mark.parametrize(
    ("size", "text"), [(None, tables.MISSING), (0, "0"), (3 * 2**29, "1.50"), (1, "<0.01"), (2**40, "1,024.00")]
)
def test_gib(size, text):
    assert tables.gib(size) == text


@pytest.mark.parametrize(("part", "text"), [(None, tables.MISSING), (Fraction(-1, 8), "-12.50"), (Fraction(0), "0")])
def test_percent(part, text):
    assert tables.percent(part) == text


@pytest.mark.parametrize(
    ("entries", "text"),
    [(None, tables.MISSING), (0, "0"), (999, "999"), (1234567, "1,234,567"), (10**30, "≈10^30.0")],
)
def test_count(entries, text):
    assert tables.count(entries) == text


@pytest.mark.parametrize(
    ("time_s", "text"),
    [
        (None, tables.MISSING),
        (0.0, "0"),
        (0.25, "250.00"),
        (2, "2,000.00"),
        (1e-9, "<0.01"),
        (5e-324, "<0.01"),
        (1e300, "≈10^303.0"),
    ],
)
def test_milliseconds(time_s, text):
    assert tables.milliseconds(time_s) == text


@pytest.mark.parametrize(
    ("value", "reference", "expected"),
    [
        (3, 2, Fraction(3, 2)),
        (0, 2, 0),
        (None, 2, None),
        (2, None, None),
        (2, 0, None),
        (10**500, 10**400, Fraction(10**100)),
        (10**400, 0.5, Fraction(2 * 10**400)),
    ],
)
def test_ratio(value, reference, expected):
    assert tables.ratio(value, reference) == expected


@pytest.mark.parametrize("name", STATUSES)
def test_status_other_than_ok_comes_with_its_reason(name):
    one = replace(LORA, status=name, reason="the reason")
    assert tables.status(one) == ("ok" if name == "ok" else f"{name}: the reason")


@pytest.mark.parametrize(
    ("matched", "budget", "text"),
    [
        (True, 7, "matched"),
        (False, None, "unmatched: no budget to match"),
        (False, 8, "unmatched: a budget of its own"),
        (None, 7, tables.MISSING),
    ],
)
def test_matching(matched, budget, text):
    assert tables.matching(replace(LORA, matched=matched, budget=budget)) == text


def test_why_no_budget_could_be_matched():
    assert tables.matching(replace(LORA, matched=False, reason="no budget fits")) == "unmatched: no budget fits"
    failed = replace(FULL, matched=False, status="oom", reason="out of memory")
    assert tables.matching(failed) == "unmatched: no budget to match"


def test_row_shows_what_the_record_holds():
    row = shown(tables.results_table([LORA, FULL]), 0)
    assert row["run", "method"] == "lora[7]"
    assert row["outcome", "budget matched"] == "matched"
    assert row["live memory", "resident"] == "10.00"
    assert row["peak live memory", "step"] == "30.00"
    assert row["step time", "ms"] == "250.00"
    assert row["parameters", "budget"] == "1,234,567"


def test_every_size_time_and_count_has_its_own_column():
    names = [
        "resident_bytes",
        *PEAKS,
        "peak_step_bytes",
        "peak_eval_bytes",
        "peak_preparation_bytes",
        "kernel_workspace_bytes",
        "process_peak_bytes",
        "step_time_s",
        "step_time_ratio",
        *COUNTS,
    ]
    for name in names:
        table = tables.results_table([Record(method="m", model="m", **{name: 1})])
        (row,) = table.rows
        obtained = [
            column.field
            for column, cell in zip(table.columns, row.cells, strict=True)
            if column.numeric and not cell.missing
        ]
        assert obtained == [name]


def test_nothing_obtained_is_missing_and_sorts_as_missing():
    table = tables.results_table([Record(method="lora", model="m")])
    (row,) = table.rows
    cells = [cell for column, cell in zip(table.columns, row.cells, strict=True) if column.numeric]
    assert cells
    assert {(cell.text, cell.sort) for cell in cells} == {(tables.MISSING, None)}
    assert table.references == ()


def test_ratios_to_lora_and_full():
    table = tables.results_table([LORA, FULL, SPARSE])
    sparse = shown(table, 2)
    assert sparse["ratio", "peak / lora"] == "2.000"
    assert sparse["ratio", "peak / full"] == "0.500"
    assert shown(table, 0)["ratio", "peak / lora"] == "1.000"
    assert table.references == ("lora[7]", "full")


def test_time_is_shown_as_the_paired_ratio_with_its_interval():
    paired = replace(LORA, step_time_ratio=0.634, step_time_ratio_low=0.6099, step_time_ratio_high=0.66)
    table = tables.results_table([paired, FULL])
    (column,) = [heading for heading in shown(table, 0) if heading[1].startswith("to full's")]
    assert shown(table, 0)[column] == "0.63 (0.61 to 0.66)"
    assert shown(table, 1)[column] == tables.MISSING
    (index,) = [place for place, column in enumerate(table.columns) if column.field == "step_time_ratio"]
    assert [row.cells[index].sort for row in table.rows] == ["0.634", None]
    # A ratio of medians that were not taken in the same rounds stands nowhere.
    assert not any(column.heading.startswith("time") for column in table.columns)


def test_pairing_and_rounds_are_circumstances_and_part_of_no_name():
    records = [replace(LORA, pairing="rounds", timed_rounds=15), replace(LORA, pairing="blocks", timed_rounds=15)]
    assert tables.differing_circumstances(records) == ["pairing"]
    assert ("timed_rounds", "15") in tables.shared_circumstances(records)
    assert tables.variation(records[0], records) == ""
    assert tables.variation(LORA, [LORA, replace(LORA, seed=3)]) == "seed 0"


def test_what_a_prediction_or_a_failure_cannot_know_is_no_part_of_a_name():
    ran = replace(LORA, device_name="some processor", threads=2, padding_fraction=0.5, attention="sdpa")
    predicted = replace(ran, source="predicted", device_name=None, threads=None, gpu="t4")
    failed = replace(ran, status="refused", padding_fraction=None)
    assert {tables.variation(record, [ran, predicted, failed]) for record in (ran, predicted, failed)} == {""}
    # The table has them all the same.
    assert set(tables.differing_circumstances([ran, predicted])) == {"source", "device_name", "threads", "gpu"}
    other = replace(predicted, gpu="a100")
    group = [ran, predicted, other]
    assert [tables.variation(record, group) for record in group] == ["", "gpu t4", "gpu a100"]
    # Of a run that ended ok it says something: there is no attention.
    assert tables.variation(replace(ran, attention=None), [ran, replace(ran, attention=None)]) == "attention —"


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        ("layer 7x13", ("layer", 7, 13)),
        ("block 1024x4096", ("block", 1024, 4096)),
        ("roberta-base", None),
        ("my layer 7x13", None),
        ("layer 7x13x2", None),
    ],
)
def test_layers_and_blocks_of_no_model_are_known_by_name(model, shape):
    assert tables.alone(model) == shape


def test_no_ratio_columns_without_the_reference():
    headings = [column.heading for column in tables.results_table([SPARSE]).columns if column.group == "ratio"]
    assert headings == []


@pytest.mark.parametrize(
    "change",
    [
        {"status": "diverged", "reason": "loss"},
        {"source": "predicted"},
        {"device_semantics": "cuda"},
        {"gpu": "t4"},
        {"attention": "sdpa"},
        {"threads": 3},
        {"peak_step_bytes": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_no_ratio_to_a_reference_that_failed_or_ran_otherwise(change):
    table = tables.results_table([replace(LORA, **change), SPARSE])
    assert shown(table, 1)["ratio", "peak / lora"] == tables.MISSING


def test_first_reference_that_ended_ok_is_the_one():
    failed = replace(LORA, budget=3, status="oom", peak_step_bytes=MIB)
    later = replace(LORA, budget=9, peak_step_bytes=MIB)
    table = tables.results_table([failed, LORA, later, SPARSE])
    assert shown(table, 3)["ratio", "peak / lora"] == "2.000"
    assert table.references == ("lora[7]",)


def test_differing_circumstances_become_columns_and_shared_ones_do_not():
    records = [LORA, replace(SPARSE, attention="sdpa")]
    headings = [column.heading for column in tables.results_table(records).columns]
    assert "attention" in headings
    assert "targets" not in headings
    shared = dict(tables.shared_circumstances(records))
    assert shared["targets"] == "mlp"
    assert "attention" not in shared
    assert "data" not in shared  # nobody said where the data came from


def test_cuda_columns_only_where_a_record_has_them():
    on_cpu = tables.results_table([LORA])
    on_cuda = tables.results_table([LORA, replace(SPARSE, peak_reserved_bytes=0)])
    assert not any(column.group.startswith("CUDA") for column in on_cpu.columns)
    assert shown(on_cuda, 1)["CUDA", "reserved"] == "0"
    assert shown(on_cuda, 0)["CUDA", "reserved"] == tables.MISSING


def test_groups_span_all_columns():
    table = tables.results_table([LORA, FULL])
    assert sum(span for _, span in table.groups) == len(table.columns)
    assert all(len(row.cells) == len(table.columns) for row in table.rows)


def test_kernels_of_cuda_and_of_the_cpu_are_workloads_of_their_own():
    cuda = replace(LORA, device_semantics="cuda", source="predicted")
    groups = tables.by_workload([LORA, cuda, SPARSE])
    assert [regimes for regimes in groups.values()] == [{"all": [LORA, SPARSE]}, {"all": [cuda]}]
    assert [workload.title for workload in groups] == [
        "layer 7x13, batch 1, seq 17, float32",
        "layer 7x13, batch 1, seq 17, float32, CUDA",
    ]


def test_workloads_and_regimes_are_kept_apart_and_in_order():
    frozen = replace(LORA, train_rest="none")
    half = replace(LORA, dtype="bfloat16")
    longer = replace(LORA, seq=18)
    groups = tables.by_workload([frozen, half, LORA, longer, SPARSE])
    assert [list(regimes.items()) for regimes in groups.values()] == [
        [("all", [LORA, SPARSE]), ("none", [frozen])],
        [("all", [half])],
        [("all", [longer])],
    ]
    first = next(iter(groups))
    assert first.title == "layer 7x13, batch 1, seq 17, float32"
    assert first.shape == "batch 1, seq 17, float32"


def test_environment_counts_values():
    records = [replace(LORA, threads=2), replace(LORA, threads=2), replace(LORA, threads=None)]
    assert dict(tables.environment(records))["threads"] == [("2", 2), (tables.MISSING, 1)]


def test_period_ignores_records_without_a_time():
    records = [replace(LORA, created_at=time) for time in ("2025-03-02", None, "2025-03-01")]
    assert tables.period(records) == ("2025-03-01", "2025-03-02")
    assert tables.period([LORA]) is None


def test_summary():
    records = [LORA, replace(LORA, status="oom"), replace(LORA, source="predicted")]
    assert tables.summary(records) == "3 records: 2 ok, 1 oom, 2 measured, 1 predicted"
    assert tables.summary([]) == "no records"
