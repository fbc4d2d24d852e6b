"""The number of kept entries, which ones they are, and the energy they hold."""

import itertools

import pytest
import torch

from benchmarks.harness.memory import Tracker
from sparsegrad import SparseGradError
from sparsegrad.products import RowBlock
from sparsegrad.support import kept_energy, resolve_nnz, topk_coo, topk_coo_of_product


def distinct(rows: int, cols: int) -> torch.Tensor:
    """Magnitudes 1 .. rows * cols in random places, every other one negative: no ties."""
    magnitude = torch.arange(1, rows * cols + 1, dtype=torch.float64)
    signed = magnitude * torch.where(magnitude % 2 == 0, 1.0, -1.0)
    return signed[torch.randperm(rows * cols)].view(rows, cols)


def largest(dense: torch.Tensor, nnz: int) -> dict[tuple[int, int], float]:
    """(row, col) -> value of the entries of largest magnitude, by sorting all of them."""
    places = itertools.product(range(dense.shape[0]), range(dense.shape[1]))
    entries = {(i, j): dense[i, j].item() for i, j in places}
    kept = sorted(entries, key=lambda place: -abs(entries[place]))[:nnz]
    return {place: entries[place] for place in kept}


def entries(sparse: torch.Tensor) -> dict[tuple[int, int], float]:
    return {tuple(i): v for i, v in zip(sparse.indices().T.tolist(), sparse.values().tolist(), strict=True)}


@pytest.mark.parametrize(
    ("shape", "density", "expected"),
    [
        ((768, 3072), 0.01, 23593),  # 23592.96: the paper's "about 22 000" for 1 %
        ((11008, 4096), 0.002, 90178),  # 90177.536
        ((10, 10), 0.01, 1),
        ((5, 7), 1.0, 35),
        ((5, 7), 1, 35),
        ((5, 7), 1e-9, 1),  # never none
        ((1, 1), 0.5, 1),
    ],
)
def test_density_is_a_share_of_the_entries(shape, density, expected):
    assert resolve_nnz(shape, density=density) == expected


@pytest.mark.parametrize("nnz", [1, 17, 35])
def test_nnz_is_taken_as_it_is(nnz):
    assert resolve_nnz((5, 7), nnz=nnz) == nnz


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.0001, 1.5, float("nan"), float("inf")])
def test_density_outside_its_range_is_refused(density):
    with pytest.raises(SparseGradError, match=rf"density must be in \(0, 1\], got {density}"):
        resolve_nnz((5, 7), density=density)


@pytest.mark.parametrize("nnz", [0, -1, 36, 2.0, True, "3"])
def test_nnz_outside_its_range_is_refused(nnz):
    with pytest.raises(SparseGradError, match=f"nnz must be an integer from 1 to 35 .* 5 x 7, got {nnz}"):
        resolve_nnz((5, 7), nnz=nnz)


@pytest.mark.parametrize("both", [{}, {"nnz": 3, "density": 0.5}])
def test_exactly_one_of_nnz_and_density(both):
    with pytest.raises(SparseGradError, match="exactly one of nnz and density"):
        resolve_nnz((5, 7), **both)


@pytest.mark.parametrize("nnz", [1, 2, 17, -1])
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (1, 11), (11, 1), (1, 1)])
def test_topk_is_what_sorting_gives(shape, nnz):
    dense = distinct(*shape)
    nnz = dense.numel() if nnz == -1 else min(nnz, dense.numel())
    sparse = topk_coo(RowBlock(dense, None), nnz, shape)
    assert sparse.shape == shape
    assert entries(sparse) == largest(dense, nnz)


@pytest.mark.parametrize("rows", [[0], [4], [1, 3], [0, 2, 5]])
def test_topk_maps_a_row_block_back(rows):
    dense = torch.zeros(6, 7, dtype=torch.float64)
    block = distinct(len(rows), 7)
    dense[rows] = block
    sparse = topk_coo(RowBlock(block, torch.tensor(rows)), 5, (6, 7))
    assert entries(sparse) == largest(dense, 5)


def test_topk_is_coalesced_as_torch_means_it():
    sparse = topk_coo(RowBlock(distinct(6, 7), torch.tensor([0, 1, 2, 4, 5, 8])), 20, (9, 7))
    # Raises unless indices are in range; for a tensor said to be coalesced, unless they are sorted and distinct too.
    torch.sparse_coo_tensor(
        sparse._indices(), sparse._values(), sparse.shape, is_coalesced=sparse.is_coalesced(), check_invariants=True
    )
    assert sparse.is_coalesced()


def test_ties_do_not_change_how_many_are_kept():
    dense = torch.tensor([[2.0, -1.0, 1.0], [1.0, -2.0, 1.0]])
    kept = entries(topk_coo(RowBlock(dense, None), 4, (2, 3)))
    assert len(kept) == 4
    assert sorted(abs(value) for value in kept.values()) == [1, 1, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_the_gradients_own(dtype):
    dense = torch.randn(5, 7).to(dtype)
    sparse = topk_coo(RowBlock(dense, None), 35, (5, 7))
    assert sparse.dtype == dtype
    assert torch.equal(sparse.to_dense(), dense)


def test_kept_energy_is_a_share_of_the_squared_norm():
    gradient = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    assert kept_energy(gradient, 0.25) == pytest.approx(16 / 25, rel=1e-12)
    assert kept_energy(gradient, 0.5) == pytest.approx(1.0, rel=1e-12)


# The largest entries of a product that is made in row blocks


@pytest.mark.parametrize("blocks", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("nnz", [1, 6, 17, 76, 77])
@pytest.mark.parametrize("shape", [(11, 7), (7, 11), (1, 77), (77, 1)])
def test_blocks_keep_the_largest_of_the_whole(shape, nnz, blocks):
    # a.T @ b is `dense` itself, without rounding.
    dense = distinct(*shape)
    found = topk_coo_of_product(torch.eye(shape[0], dtype=torch.float64), dense, nnz, blocks)
    assert found.is_coalesced()
    assert found.shape == shape
    assert entries(found) == largest(dense, nnz)
    places = [divmod(place, shape[1]) for place in range(77)]
    assert list(entries(found)) == [place for place in places if place in entries(found)]


def test_blocks_with_ties_keep_as_many():
    dense = torch.ones(6, 5, dtype=torch.float64)
    dense[4, 3] = -2
    found = topk_coo_of_product(torch.eye(6, dtype=torch.float64), dense, 8, 4)
    assert len(entries(found)) == 8
    assert sorted(entries(found).values()) == [-2] + [1] * 7
    assert entries(found)[4, 3] == -2


def test_blocks_hold_no_whole_product():
    a, b = torch.randn(16, 64), torch.randn(16, 64)
    tracker = Tracker()
    with tracker:
        start = tracker.position
        found = topk_coo_of_product(a, b, 40, 8)
        end = tracker.position
    assert found._nnz() == 40
    given = 2 * 4 * 16 * 64
    # A block of 8 x 64 and its magnitudes, and 40 entries with int64 positions twice: kept, and found in the block.
    assert tracker.peak(start, end).bytes - given == 2 * 4 * 8 * 64 + 2 * (4 + 8) * 40
