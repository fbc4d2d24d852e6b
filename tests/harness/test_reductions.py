"""The partial results of a card's reductions: closed forms, and what an H100 allocated for them."""

import csv
from pathlib import Path

import pytest

from benchmarks.harness.cards import card
from benchmarks.harness.reductions import partial_results_bytes

MIB = 2**20
MEASURED = Path(__file__).parents[2] / "benchmarks" / "reference" / "h100" / "reductions.csv"
H100 = card("h100")


def of_matrix(rows, columns, dims, accumulator=4, on=H100):
    return partial_results_bytes(on, (rows, columns), (columns, 1), dims, accumulator)


def test_a_bias_gradient_holds_a_number_for_every_thread():
    # Blocks of 32 x 4 threads take 128 columns; 64 blocks share the rows, so that each thread has 16 of 4096.
    assert of_matrix(4096, 3072, {0}) == [4 * 3072 * 64 * 128, 4 * 24]
    assert of_matrix(4096, 3072, {0})[0] == 96 * MIB


def test_few_rows_are_not_shared():
    # 256 for each of a block's four rows of threads is where blocks begin to share.
    assert of_matrix(1020, 3072, {0}) == []
    assert of_matrix(1024, 3072, {0}) == [4 * 3072 * 16 * 128, 4 * 24]


def test_no_more_blocks_than_the_card_holds_at_once():
    # 86 blocks of 128 columns: with 132 x 16 blocks resident 25 can share one's rows, with 40 x 8 only 4 can.
    assert of_matrix(4096, 11008, {0})[0] == 4 * 11008 * 25 * 128
    assert of_matrix(4096, 11008, {0}, on=card("t4"))[0] == 4 * 11008 * 4 * 128


def test_along_the_rows_a_block_holds_one_number():
    assert of_matrix(4096, 3072, {1}) == []
    # All of it: blocks of 512 threads, of which 528 are resident.
    assert of_matrix(4096, 3072, {0, 1}) == [4 * 528, 4]


def test_leading_dimensions_are_one():
    whole = of_matrix(32 * 128, 768, {0})
    assert partial_results_bytes(H100, (32, 128, 768), (128 * 768, 768, 1), {0, 1}, 4) == whole
    assert partial_results_bytes(H100, (1, 4096, 768), (1, 768, 1), {0, 1}, 4) == whole
    # A transposed matrix is summed as it lies in memory.
    assert partial_results_bytes(H100, (768, 4096), (1, 768), {1}, 4) == whole


def test_nothing_to_reduce():
    assert of_matrix(4096, 768, set()) == []
    assert of_matrix(0, 768, {0}) == []
    assert partial_results_bytes(H100, (), (), set(), 4) == []


def measured():
    with MEASURED.open(newline="") as file:
        return list(csv.DictReader(file))


def test_what_an_h100_allocated():
    rows = measured()
    assert len(rows) == 640
    assert sum(row["temporary_bytes"] != "0" for row in rows) > 200
    for row in rows:
        each = 2 if (row["operation"], row["dtype"]) == ("amax", "bfloat16") else 4
        dims = {int(dim) for dim in row["dims"].split()}
        found = of_matrix(int(row["rows"]), int(row["columns"]), dims, each)
        assert sum(found) == int(row["temporary_bytes"]), row


@pytest.mark.parametrize("capability", ["7.0", "7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0", "11.0"])
def test_a_card_known_by_its_capability_has_multiprocessors(capability):
    assert of_matrix(4096, 3072, {0}, on=card(capability))[0] >= MIB
