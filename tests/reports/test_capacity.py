from dataclasses import replace

import pytest

from reports import capacity, tables
from reports.capacity import FITS, TIGHT, TOO_SMALL
from reports.record import STATUSES, Record

GIB = 2**30
LORA = Record(
    method="lora",
    budget=7,
    model="llama",
    source="predicted",
    device="cuda",
    device_semantics="cuda",
    gpu="9.0",
    attention="eager",
    peak_step_bytes=20 * GIB,
    peak_reserved_bytes=23 * GIB,
    peak_preparation_bytes=12 * GIB,
    peak_phase="backward",
)
PREPARED = replace(LORA, method="sparsegrad", peak_preparation_bytes=30 * GIB)
REFUSED = replace(
    LORA, status="refused", reason="why", **dict.fromkeys(("peak_step_bytes", "peak_reserved_bytes", "peak_phase"))
)


def shown(record: Record, *others: Record) -> dict[str, str]:
    """The cells of the record's row by group and heading."""
    table = capacity.table([record, *others])
    keys = [f"{column.group}: {column.heading}".replace("\u00a0", " ") for column in table.columns]
    return dict(zip(keys, [cell.text.replace("\u00a0", " ") for cell in table.rows[0].cells], strict=True))


@pytest.mark.parametrize(
    ("changes", "asks"),
    [
        ({}, True),
        ({"status": "refused"}, True),
        ({"source": "measured"}, False),
        ({"device_semantics": "cpu"}, False),
        ({"model": "layer 64x128"}, False),
        ({"model": "block 64x128"}, False),
    ],
)
def test_predictions_for_cuda_of_a_model_are_asked(changes, asks):
    record = replace(LORA, **changes)
    assert capacity.asking([record]) == ([record] if asks else [])


# With the context LORA allocates 20.5 GiB and holds 23.5 GiB.
@pytest.mark.parametrize(
    ("card", "word"),
    [
        (23 * GIB + GIB // 2, FITS),
        (23 * GIB + GIB // 2 - 1, TIGHT),
        (20 * GIB + GIB // 2, TIGHT),
        (20 * GIB + GIB // 2 - 1, TOO_SMALL),
    ],
)
def test_between_what_is_allocated_and_what_is_held_it_is_tight(card, word):
    assert capacity.word(LORA, card) == word


@pytest.mark.parametrize(("card", "word"), [(30 * GIB + GIB // 2, FITS), (30 * GIB + GIB // 2 - 1, TOO_SMALL)])
def test_a_preparation_above_the_step_must_fit_too(card, word):
    assert capacity.word(PREPARED, card) == word


def test_a_preparation_between_allocated_and_held_decides_what_is_tight():
    between = replace(LORA, peak_preparation_bytes=22 * GIB)
    assert capacity.word(between, 22 * GIB) == TOO_SMALL
    assert capacity.word(between, 23 * GIB) == TIGHT
    assert capacity.word(between, 24 * GIB) == FITS
    assert capacity.decides(between) == "preparation"


@pytest.mark.parametrize(("fits", "word"), [(True, FITS), (False, TOO_SMALL), (None, TIGHT)])
def test_the_record_s_own_word_decides_for_its_own_size_alone(fits, word):
    asked = replace(LORA, gpu_memory_bytes=21 * GIB, fits=fits)
    assert capacity.word(asked, 21 * GIB) == word
    assert capacity.word(asked, 22 * GIB) == TIGHT


@pytest.mark.parametrize("status", [status for status in STATUSES if status != "ok"])
def test_what_did_not_end_ok_has_its_status_for_a_word(status):
    assert capacity.word(replace(LORA, status=status, gpu_memory_bytes=24 * GIB, fits=True), 24 * GIB) == status
    assert capacity.Need.of(replace(LORA, status=status)) is None


@pytest.mark.parametrize("name", ["peak_step_bytes", "peak_reserved_bytes", "peak_preparation_bytes"])
def test_what_was_not_obtained_is_missing(name):
    partial = replace(LORA, **{name: None})
    assert capacity.word(partial, 80 * GIB) == tables.MISSING
    assert capacity.decides(partial) == tables.MISSING
    assert shown(partial)["a card must have: needed, GiB"] == tables.MISSING


def test_table_has_a_word_for_each_card_and_what_decides():
    assert shown(LORA) == {
        "run: method": "lora[7]",
        "a card must have: needed, GiB": "23.50",
        "fits on a card of: 16 GiB": "does not fit",
        "fits on a card of: 24 GiB": "fits",
        "fits on a card of: 40 GiB": "fits",
        "fits on a card of: 80 GiB": "fits",
        "what decides: phase": "backward",
        "in a step, GiB: allocated": "20.00",
        "in a step, GiB: reserved": "23.00",
        "in the preparation, GiB: allocated": "12.00",
    }
    row = shown(PREPARED)
    assert (row["a card must have: needed, GiB"], row["what decides: phase"]) == ("30.50", "preparation")


def test_table_sorts_sizes_by_bytes_and_words_from_best_to_worst():
    tight = replace(LORA, peak_reserved_bytes=24 * GIB)
    table = capacity.table([LORA, tight, PREPARED, REFUSED])
    headings = [column.heading.replace("\u00a0", " ") for column in table.columns]
    needed, card = headings.index("needed, GiB"), headings.index("24 GiB")
    assert [row.cells[card].text for row in table.rows] == ["fits", "tight", "does not fit", "refused"]
    words = [row.cells[card].sort for row in table.rows]
    assert words == sorted(set(words))
    assert [row.cells[needed].sort for row in table.rows] == [
        *(str(size * GIB // 2) for size in (47, 49, 61)),
        None,
    ]


def test_table_says_why_there_is_no_word():
    row = shown(REFUSED, LORA)
    assert {row[f"fits on a card of: {size} GiB"] for size in (16, 24, 40, 80)} == {"refused"}
    assert row["outcome: status"] == "refused: why"
    assert row["what decides: phase"] == tables.MISSING
    assert "outcome: status" not in shown(LORA)


def test_table_shows_the_size_that_was_asked_about_and_where_memory_ran_out():
    small = replace(LORA, gpu_memory_bytes=24 * GIB, fits=False, oom_phase="optimizer")
    other = replace(LORA, gpu_memory_bytes=48 * GIB, fits=True)
    assert shown(small)["fits on a card of: 24 GiB"] == "does not fit (optimizer)"
    assert shown(small)["fits on a card of: 16 GiB"] == "does not fit"
    assert not any("asked" in key for key in shown(small))
    assert shown(other, LORA)["fits on a card of: the size asked about"] == "48 GiB: fits"
    assert shown(LORA, other)["fits on a card of: the size asked about"] == tables.MISSING


def test_kernels_that_are_meant_are_named_once():
    flash = replace(LORA, gpu="a100", attention="sdpa", attention_kernel="flash")
    unknown = replace(flash, status="refused", attention_kernel=None)
    assert capacity.meant([LORA, flash, LORA, unknown]) == (
        "Predicted for the kernels of a card of compute capability 9.0 (attention: eager), "
        "of a100 (attention: sdpa by flash)."
    )
    assert capacity.meant([unknown]) == "Predicted for the kernels of a100 (attention: sdpa)."
