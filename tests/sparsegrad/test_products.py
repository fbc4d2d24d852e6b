"""The sparse-by-dense product against the plain one, and what it may and may not touch."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparsegrad.products import (
    LiveRows,
    RowBlock,
    Selection,
    dense_product,
    nonzero_stripes,
    sparse_by_dense,
    transposed_dense_product,
    transposed_sparse_by_dense,
)

SHAPES = [(7, 5, 3), (1, 5, 3), (13, 1, 2), (1, 1, 1), (2, 11, 17)]
PATTERNS = ["dense", "zero rows", "zero columns", "both", "one row", "one entry", "all zero"]
# Sums of at most 13 products of unit size, in float64.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def matrix(rows: int, cols: int, pattern: str = "dense") -> torch.Tensor:
    a = torch.randn(rows, cols, dtype=torch.float64)
    keep = torch.zeros(rows, cols, dtype=torch.bool)
    keep_rows, keep_cols = {
        "dense": (slice(None), slice(None)),
        "zero rows": (slice(0, None, 2), slice(None)),
        "zero columns": (slice(None), slice(0, None, 2)),
        "both": (slice(0, None, 3), slice(0, None, 2)),
        "one row": (slice(rows // 2, rows // 2 + 1), slice(None)),
        "one entry": (slice(rows - 1, rows), slice(cols - 1, cols)),
        "all zero": (slice(0, 0), slice(0, 0)),
    }[pattern]
    keep[keep_rows, keep_cols] = True
    return a * keep


def flops(function, *args) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


def scattered(result: RowBlock, rows: int) -> torch.Tensor:
    """The whole matrix that a row block stands for."""
    if result.rows is None:
        return result.block
    whole = result.block.new_zeros(rows, result.block.shape[1])
    whole[result.rows] = result.block
    return whole


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_by_dense_is_the_product(shape, pattern):
    m, n, p = shape
    a, b = matrix(m, n, pattern), matrix(n, p)
    expected = torch.einsum("mn,np->mp", a, b)
    torch.testing.assert_close(sparse_by_dense(a, b), expected, **EXACT)
    torch.testing.assert_close(dense_product(a, b), expected, **EXACT)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES)
def test_transposed_products_are_the_product(shape, pattern):
    t, m, p = shape
    a, b = matrix(t, m, pattern), matrix(t, p)
    expected = torch.einsum("tm,tp->mp", a, b)
    torch.testing.assert_close(scattered(transposed_sparse_by_dense(a, b), m), expected, **EXACT)
    torch.testing.assert_close(scattered(transposed_dense_product(a, b), m), expected, **EXACT)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES)
def test_stripes_are_the_lines_with_a_nonzero(shape, pattern):
    a = matrix(*shape[:2], pattern)
    found = nonzero_stripes(a)
    for stripe, lines in ((found.rows, a.tolist()), (found.cols, a.T.tolist())):
        expected = [i for i, line in enumerate(lines) if any(value != 0 for value in line)]
        # None stands for every line.
        assert (list(range(len(lines))) if stripe is None else stripe.tolist()) == expected
        assert (stripe is None) == (len(expected) == len(lines))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_smallest_magnitude_is_a_nonzero(dtype):
    a = torch.zeros(3, 4, dtype=dtype)
    a[1, 2] = -torch.finfo(dtype).smallest_normal
    assert [stripe.tolist() for stripe in nonzero_stripes(a)] == [[1], [2]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_or_infinity_in_a_reaches_the_product(value):
    a = torch.zeros(3, 4)
    a[1, 2] = value
    product = sparse_by_dense(a, torch.ones(4, 2))
    assert not product[1].isfinite().any()
    assert product[[0, 2]].eq(0).all()
    block = transposed_sparse_by_dense(a, torch.ones(3, 2))
    assert block.rows.tolist() == [2]
    assert not block.block.isfinite().any()


def test_no_zero_stripe_of_a_is_multiplied():
    a = torch.zeros(7, 5, dtype=torch.float64)
    a[[1, 4]] = 1.0
    a[:, [0, 3]] = 0.0
    b = torch.ones(5, 3, dtype=torch.float64)
    b[[0, 3]] = float("nan")
    expected = torch.zeros(7, 3, dtype=torch.float64)
    expected[[1, 4]] = 3.0  # three columns of ones are left
    assert torch.equal(sparse_by_dense(a, b), expected)
    # The plain product pays for the zeros, and 0 * NaN is NaN.
    assert dense_product(a, b).isnan().all()


def test_no_zero_token_enters_the_weight_gradient():
    a = torch.zeros(5, 4, dtype=torch.float64)
    a[2, [0, 3]] = torch.tensor([2.0, -1.0], dtype=torch.float64)
    b = torch.full((5, 3), float("nan"), dtype=torch.float64)
    b[2] = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    block, rows = transposed_sparse_by_dense(a, b)
    assert rows.tolist() == [0, 3]
    assert block.tolist() == [[2.0, 4.0, 6.0], [-1.0, -2.0, -3.0]]


def test_flops_are_those_of_the_nonzero_stripes():
    m, n, p, rows, cols = 13, 11, 7, 3, 2
    a = torch.zeros(m, n)
    a[:rows, :cols] = 1.0
    assert flops(sparse_by_dense, a, torch.ones(n, p)) == 2 * rows * cols * p
    assert flops(transposed_sparse_by_dense, a, torch.ones(m, p)) == 2 * rows * cols * p
    assert flops(dense_product, a, torch.ones(n, p)) == 2 * m * n * p


def test_no_token_gives_zeros():
    a, b = torch.zeros(0, 5), torch.zeros(5, 3)
    assert sparse_by_dense(a, b).shape == (0, 3)
    gradient = scattered(transposed_sparse_by_dense(a, torch.zeros(0, 3)), 5)
    assert torch.equal(gradient, torch.zeros(5, 3))


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("block_rows", [1, 2, 5, 7, 9])
@pytest.mark.parametrize("entries", ["all", "one", "corners", "some", "first rows and a column"])
@pytest.mark.parametrize("shape", [(7, 5), (1, 11), (7, 1), (13, 17)])
def test_selection_takes_the_entries_of_the_product(shape, entries, block_rows, rotated):
    m, p = shape
    column = [row * p + p // 2 for row in range(m)]
    flat = {
        "all": torch.arange(m * p),
        "one": torch.tensor([m * p // 2]),
        "corners": torch.tensor(sorted({0, m * p - 1})),
        "some": torch.randperm(m * p)[: max(1, m * p // 3)].sort().values,
        "first rows and a column": torch.tensor(sorted({*range(min(2, m) * p), *column})),
    }[entries]
    n = 4 if rotated else m
    a, b, rotation = matrix(3, n), matrix(3, p), matrix(m, n) if rotated else None
    expected = torch.einsum("tm,tp->mp", a, b)
    expected = (torch.einsum("mn,np->mp", rotation, expected) if rotated else expected).flatten()[flat]
    selection = Selection(flat.int(), shape, block_rows)
    torch.testing.assert_close(selection.select(a, b, flat.int(), rotation), expected, **EXACT)


def test_selection_multiplies_only_the_columns_that_hold_an_entry():
    t, m, p, block_rows = 3, 6, 9, 3
    # Two columns of the first block's nine (one of them twice) are few, three of the second's are not.
    flat = torch.tensor([1, 4, 2 * p + 1, 3 * p, 4 * p + 1, 5 * p + 2])
    selection = Selection(flat, (m, p), block_rows)
    assert flops(selection.select, torch.ones(t, m), torch.ones(t, p), flat) == 2 * t * block_rows * (2 + p)


def test_selection_multiplies_only_the_blocks_that_hold_an_entry():
    t, m, p, block_rows = 3, 12, 5, 4
    flat = torch.tensor([5 * p + 1, 6 * p])  # rows 5 and 6: the second of three blocks, and not few of its columns
    selection = Selection(flat, (m, p), block_rows)
    assert flops(selection.select, torch.ones(t, m), torch.ones(t, p), flat) == 2 * t * block_rows * p


@pytest.mark.parametrize("live", [[], [2], [0, 3, 4], [0, 1, 2, 3, 4]])
def test_live_rows_go_out_and_come_back(live):
    dy, x = torch.zeros(5, 3), torch.randn(5, 4)
    dy[live, 1] = 2.0
    rows = LiveRows(dy)
    assert torch.equal(rows.of(x), x[live])
    expected = torch.zeros(5, 4)
    expected[live] = x[live]
    assert torch.equal(rows.back(rows.of(x)), expected)


@pytest.mark.parametrize(("zero", "count"), [(1, 8), (1, 7), (2, 16)])
def test_an_eighth_of_zero_rows_is_skipped(zero, count):
    dy = torch.ones(count, 3)
    dy[:zero] = 0
    assert LiveRows(dy).of(torch.ones(count, 4)).shape[0] == count - zero
    assert nonzero_stripes(dy.T).cols.tolist() == list(range(zero, count))


@pytest.mark.parametrize(("zero", "count"), [(0, 5), (1, 9), (2, 17)])
def test_a_few_zero_rows_are_multiplied_along(zero, count):
    dy, x = torch.ones(count, 3), torch.randn(count, 4)
    dy[:zero] = 0
    rows = LiveRows(dy)
    assert rows.of(x) is x
    assert rows.back(x) is x
