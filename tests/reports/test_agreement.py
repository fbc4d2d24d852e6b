from dataclasses import replace

import pytest

from reports import agreement, tables
from reports.record import Record

MIB = 2**20
SIZES = {name: (10 + number) * MIB for number, name in enumerate(agreement.FIGURES)}
MEASURED = Record(
    method="lora",
    budget=7,
    model="llama",
    batch=1,
    seq=8,
    device="cuda",
    device_semantics="cuda",
    device_name="some card",
    torch_version="2.1",
    **SIZES,
)
PREDICTED = replace(MEASURED, source="predicted", gpu="t4", device_name=None, torch_version="2.2")
# The preparation takes 15 MiB measured and 18 predicted, the forward 11 and 11 and a byte.
OFF = replace(PREDICTED, peak_preparation_bytes=18 * MIB, peak_forward_bytes=11 * MIB + 1)


def rows(pairs) -> list[dict[str, str]]:
    table = agreement.table(pairs)
    keys = [f"{column.group}: {column.heading}" for column in table.columns]
    return [dict(zip(keys, [cell.text for cell in row.cells], strict=True)) for row in table.rows]


def test_a_measurement_stands_beside_its_prediction():
    (pair,) = agreement.pairs([PREDICTED, MEASURED])
    assert (pair.measured, pair.predicted) == (MEASURED, PREDICTED)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "full"},
        {"budget": 8},
        {"model": "other"},
        {"batch": 2},
        {"seq": 9},
        {"dtype": "bfloat16"},
        {"adapter_dtype": "float32"},
        {"attention": "sdpa"},
        {"optimizer_impl": "fused"},
        {"train_rest": "none"},
        {"targets": "attention"},
        {"checkpointing": True},
        {"device_semantics": "cpu"},
        {"data": "trec"},
        {"seed": 1},
        {"status": "refused"},
        {"source": "measured"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_configuration_or_a_failure_is_no_pair(changes):
    assert agreement.pairs([MEASURED, replace(PREDICTED, **changes)]) == []


def test_a_run_that_failed_is_no_pair():
    assert agreement.pairs([replace(MEASURED, status="oom"), PREDICTED]) == []


def test_each_measurement_stands_beside_the_first_prediction_for_each_card():
    again, other = replace(MEASURED, device_name="again"), replace(PREDICTED, gpu="a100")
    found = agreement.pairs([MEASURED, PREDICTED, again, OFF, other])
    assert [(pair.measured, pair.predicted) for pair in found] == [
        (MEASURED, PREDICTED),
        (MEASURED, other),
        (again, PREDICTED),
        (again, other),
    ]


def test_every_figure_has_a_row_with_its_difference():
    found = rows(agreement.pairs([MEASURED, OFF]))
    assert [row["figure: bytes compared"] for row in found] == list(agreement.FIGURES.values())
    by_figure = {row.pop("figure: bytes compared"): row for row in found}
    assert by_figure["peak, preparation"] == {
        "run: method": "lora[7]",
        "MiB: measured": "15.00",
        "MiB: predicted": "18.00",
        "predicted less measured: MiB": "3.00",
        "predicted less measured: %": "20.00",
    }
    assert list(by_figure["peak, forward"].values())[-2:] == ["<0.01", "<0.01"]
    assert list(by_figure["resident"].values())[-2:] == ["0", "0"]
    below = rows(agreement.pairs([MEASURED, replace(PREDICTED, resident_bytes=9 * MIB)]))[0]
    assert list(below.values())[-2:] == ["-1.00", "-10.00"]


def test_a_figure_that_one_of_them_lacks_has_no_difference_and_one_that_both_lack_no_row():
    pairs = agreement.pairs([replace(MEASURED, peak_eval_bytes=None), replace(PREDICTED, peak_eval_bytes=None)])
    assert [one.field for one in pairs[0].comparisons] == [n for n in agreement.FIGURES if n != "peak_eval_bytes"]
    row = rows(agreement.pairs([replace(MEASURED, resident_bytes=None), PREDICTED]))[0]
    assert list(row.values())[-4:] == [tables.MISSING, "10.00", tables.MISSING, tables.MISSING]


def test_rows_sort_by_bytes_and_parts():
    table = agreement.table(agreement.pairs([MEASURED, OFF]))
    position = list(agreement.FIGURES).index("peak_preparation_bytes")
    assert [cell.sort for cell in table.rows[position].cells[-4:]] == [
        *(str(size * MIB) for size in (15, 18, 3)),
        "0.2",
    ]


def test_pairs_that_share_a_label_are_told_apart():
    other = replace(PREDICTED, gpu="a100")
    found = rows(agreement.pairs([MEASURED, replace(MEASURED, device_name="other card"), PREDICTED, other]))
    described = {(row["differs: device name"], row["differs: predicted for"]) for row in found}
    assert described == {(name, card) for name in ("some card", "other card") for card in ("t4", "a100")}
    assert not any(key.startswith("differs") for key in rows(agreement.pairs([MEASURED, PREDICTED]))[0])


def test_summary_names_the_largest_difference():
    pairs = agreement.pairs([MEASURED, OFF])
    assert agreement.summary(pairs) == (
        "1 pair of a measurement and a prediction, 8 figures: 6 agree to the byte. The largest difference is that of "
        "lora[7] on llama, batch 1, seq 8, float32, CUDA (train_rest all), peak, preparation: the prediction for t4 is "
        "3.00 MiB, or 20.00\u00a0%, above the 15.00 MiB measured."
    )
    below = agreement.summary(agreement.pairs([MEASURED, replace(OFF, resident_bytes=5 * MIB)]))
    assert "resident: the prediction for t4 is 5.00 MiB, or 50.00\u00a0%, below the 10.00 MiB measured." in below


def test_summary_of_nothing_but_agreement():
    pairs = agreement.pairs([MEASURED, PREDICTED, replace(MEASURED, seed=1), replace(PREDICTED, seed=1)])
    assert agreement.summary(pairs) == "2 pairs of a measurement and a prediction, 16 figures: all agree to the byte."
    bare = [replace(record, **dict.fromkeys(agreement.FIGURES)) for record in (MEASURED, PREDICTED)]
    assert agreement.summary(agreement.pairs(bare)).endswith("0 figures that both have.")


def test_a_difference_to_nothing_is_the_largest():
    zero = replace(MEASURED, peak_eval_bytes=0)
    said = agreement.summary(agreement.pairs([zero, replace(OFF, peak_eval_bytes=1)]))
    assert said.endswith("peak, eval: the prediction for t4 is <0.01 MiB above the 0 MiB measured.")


def test_circumstances_say_what_stands_beside_what():
    pairs = agreement.pairs([MEASURED, PREDICTED])
    assert dict(agreement.circumstances(pairs)) == {
        "measured on": "some card",
        "predicted for": "t4",
        "torch, measured": "2.1",
        "torch, predicted": "2.2",
    }
    on_cpu = [replace(record, device_semantics="cpu", gpu=None) for record in (MEASURED, PREDICTED)]
    assert dict(agreement.circumstances(agreement.pairs(on_cpu)))["predicted for"] == "cpu"
