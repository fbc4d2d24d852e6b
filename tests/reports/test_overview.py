from dataclasses import replace

from reports import tables
from reports.overview import MOST_ACROSS, MOST_ENTRIES, MOST_METHODS, overview
from reports.palette import METHOD_COLOURS
from reports.record import Record

MIB = 2**20
LORA = Record(method="lora", budget=7, model="m", batch=1, seq=2, peak_step_bytes=40 * MIB, step_time_ratio=0.5)
FULL = replace(LORA, method="full", budget=None, peak_step_bytes=80 * MIB, step_time_ratio=1.0)


def entries(records, method="lora"):
    found = overview(records)
    return found.rows[0].cells[found.methods.index(method)].entries


def test_rows_are_workloads_and_regimes_and_columns_are_methods():
    records = [LORA, replace(FULL, train_rest="none"), replace(LORA, model="other"), replace(LORA, method="mine")]
    found = overview(records)
    assert found.methods == ("full", "lora", "mine")
    assert [(row.workload.model, row.section, row.regime) for row in found.rows] == [
        ("m", 1, "all"),
        ("m", 1, "none"),
        ("other", 2, "all"),
    ]
    assert [[len(cell.entries) for cell in row.cells] for row in found.rows] == [[0, 1, 1], [1, 0, 0], [0, 1, 0]]


def test_methods_stand_in_the_order_of_the_palette():
    assert overview([replace(LORA, method=name) for name in sorted(METHOD_COLOURS)]).methods == tuple(METHOD_COLOURS)


def test_cell_holds_the_peak_and_what_it_is_to_lora_s():
    (entry,) = entries([LORA, FULL], "full")
    assert (entry.peak, entry.ratio, entry.time, entry.share) == ("80.00", "2.00", "1.00", 1.0)
    (entry,) = entries([LORA, FULL])
    assert (entry.peak, entry.ratio, entry.time, entry.share) == ("40.00", "1.00", "0.50", 0.5)


def test_what_was_not_obtained_is_missing():
    failed = replace(FULL, peak_step_bytes=None, step_time_ratio=None, status="oom", reason="full")
    (entry,) = entries([LORA, failed], "full")
    assert (entry.peak, entry.ratio, entry.time, entry.share) == (*[tables.MISSING] * 3, None)


def test_peaks_under_other_conditions_are_not_compared():
    (entry,) = entries([replace(LORA, source="predicted"), FULL], "full")
    assert entry.ratio == tables.MISSING
    assert entry.share == 1.0


def test_several_records_of_a_method_are_shown_by_name_and_the_rest_counted():
    records = [replace(LORA, seed=seed) for seed in range(MOST_ENTRIES + 2)]
    cell = overview(records).rows[0].cells[0]
    assert [entry.name for entry in cell.entries] == [f"[7], seed {seed}" for seed in range(MOST_ENTRIES)]
    assert cell.left_out == 2
    assert [entry.name for entry in entries([LORA])] == ["[7]"]


def test_methods_without_a_column_are_counted():
    found = overview([replace(LORA, method=f"method {number:03}") for number in range(MOST_METHODS + 5)])
    assert len(found.methods) == MOST_METHODS
    assert found.left_out == 5


def test_many_methods_on_few_workloads_stand_one_below_the_other():
    many = [replace(LORA, method=f"method {number:03}") for number in range(MOST_ACROSS + 1)]
    assert not overview(many[1:]).upright
    assert overview(many).upright
    sizes = [replace(record, seq=seq) for record in many for seq in range(1, MOST_ACROSS + 2)]
    assert not overview(sizes).upright


def test_absurd_peaks_have_a_share():
    (entry,) = entries([LORA, replace(FULL, peak_step_bytes=10**400)])
    assert 0 <= entry.share < 1e-300
    (entry,) = entries([replace(LORA, peak_step_bytes=0)])
    assert entry.share is None


def test_nothing_is_an_empty_overview():
    assert overview([]).rows == ()
