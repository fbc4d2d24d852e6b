"""The model of CUDA's caching allocator: each rule by hand, published figures, and a slow twin on random logs."""

import random
from itertools import pairwise, permutations

import pytest
import torch

from benchmarks.harness.caching_allocator import (
    AllocatorBytes,
    CachingAllocator,
    OutOfMemory,
    Replay,
    peaks_between,
)
from benchmarks.harness.errors import InputError
from benchmarks.harness.memory import Event, Tracker

KIB, MIB = 2**10, 2**20


def layout(allocator):
    """Each segment's blocks as (size, whether in use)."""
    return [[(size, requested > 0) for size, requested in segment.blocks] for segment in allocator.segments()]


def held(*requests):
    """An allocator that holds these requests, made in this order."""
    allocator = CachingAllocator()
    for requested in requests:
        allocator.allocate(requested)
    return allocator


# --- each rule on its own


@pytest.mark.parametrize(
    ("requested", "block"),
    [(1, 512), (511, 512), (512, 512), (513, 2 * 512), (100 * KIB + 7, 100 * KIB + 512)],
)
def test_a_request_is_rounded_up_to_512_bytes(requested, block):
    assert held(requested).now == AllocatorBytes(requested, block, 2 * MIB)


def test_zero_bytes_take_nothing():
    allocator = CachingAllocator()
    null = allocator.allocate(0)
    assert null is None
    allocator.free(null)
    assert allocator.now == allocator.peak == AllocatorBytes(0, 0, 0)


@pytest.mark.parametrize(
    ("requested", "block", "segment"),
    [
        (1 * MIB - 511, 1 * MIB, 2 * MIB),  # the largest of the small pool, once rounded
        (1 * MIB, 1 * MIB, 2 * MIB),
        (1 * MIB + 1, 1 * MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB, 10 * MIB),  # it is the rounded size that decides
        (10 * MIB, 10 * MIB, 10 * MIB),
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),  # remainder 2 MiB - 512
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),  # remainder 1 MiB + 512: split off
        (11 * MIB - 511, 12 * MIB, 12 * MIB),  # remainder 1 MiB: not split off
        (11 * MIB, 12 * MIB, 12 * MIB),
        (12 * MIB, 12 * MIB, 12 * MIB),
        (1000 * MIB + 1, 1000 * MIB + 512, 1002 * MIB),
    ],
)
def test_pool_segment_and_block_of_a_first_request(requested, block, segment):
    assert held(requested).now == AllocatorBytes(requested, block, segment)


def test_small_requests_share_a_segment_until_it_is_full():
    allocator = held(1 * MIB, 1 * MIB - 512)
    assert layout(allocator) == [[(1 * MIB, True), (1 * MIB - 512, True), (512, False)]]
    allocator.allocate(513)  # the 512 bytes left do not suffice
    assert allocator.reserved_bytes == 2 * 2 * MIB
    allocator.allocate(1)
    assert layout(allocator) == [
        [(1 * MIB, True), (1 * MIB - 512, True), (512, True)],
        [(1024, True), (2 * MIB - 1024, False)],
    ]


def test_the_small_pool_splits_off_512_bytes():
    allocator = CachingAllocator()
    block, _ = allocator.allocate(1024), allocator.allocate(512)
    allocator.free(block)
    allocator.allocate(512)
    assert layout(allocator) == [[(512, True), (512, False), (512, True), (2 * MIB - 3 * 512, False)]]
    assert allocator.allocated_bytes == 2 * 512


@pytest.mark.parametrize(
    ("requested", "block"),
    [(20 * MIB, 20 * MIB), (19 * MIB, 20 * MIB), (19 * MIB - 511, 20 * MIB), (19 * MIB - 512, 19 * MIB - 512)],
)
def test_a_cached_block_that_is_not_split_counts_whole(requested, block):
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(20 * MIB))
    allocator.allocate(requested)
    assert allocator.now == AllocatorBytes(requested, block, 20 * MIB)


def test_the_remainder_between_1_and_10_mib_counts_whole_too():
    # 20 MiB holds 9.5 + 9.5 and leaves 1, which no longer is a block of its own.
    requested = 19 * MIB // 2
    assert held(requested, requested).now == AllocatorBytes(2 * requested, 20 * MIB, 20 * MIB)
    assert layout(held(requested, requested)) == [[(requested, True), (20 * MIB - requested, True)]]


def test_the_smallest_sufficient_free_block_is_taken():
    allocator = CachingAllocator()
    sizes = [3 * MIB, 2 * MIB, 5 * MIB, 2 * MIB, 4 * MIB, 2 * MIB]  # 18 MiB of a segment of 20
    blocks = [allocator.allocate(size) for size in sizes]
    for i in (0, 2, 4):
        allocator.free(blocks[i])
    allocator.allocate(7 * MIB // 2)  # 3.5 MiB: not 3, and of 4 and 5 the 4, where half a MiB remains
    assert layout(allocator) == [
        [
            (3 * MIB, False),
            (2 * MIB, True),
            (5 * MIB, False),
            (2 * MIB, True),
            (4 * MIB, True),
            (2 * MIB, True),
            (2 * MIB, False),
        ]
    ]
    assert allocator.allocated_bytes == (2 + 2 + 4 + 2) * MIB


@pytest.mark.parametrize(("ascending", "first", "second"), [(True, True, False), (False, False, True)])
def test_of_equal_free_blocks_the_one_at_the_lowest_address_is_taken(ascending, first, second):
    allocator = CachingAllocator(ascending=ascending)
    blocks = [allocator.allocate(12 * MIB), allocator.allocate(12 * MIB)]
    for block in reversed(blocks):
        allocator.free(block)
    allocator.allocate(12 * MIB)
    assert layout(allocator) == [[(12 * MIB, first)], [(12 * MIB, second)]]


def test_within_a_segment_the_lower_of_equal_free_blocks_is_taken():
    for ascending in (False, True):
        allocator = CachingAllocator(ascending=ascending)
        blocks = [allocator.allocate(512) for _ in range(4)]
        allocator.free(blocks[2])
        allocator.free(blocks[0])
        allocator.allocate(512)
        in_use = [used for _, used in layout(allocator)[0]]
        assert in_use == [True, True, False, True, False]


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_freed_blocks_merge_with_their_neighbours(order):
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size) for size in (2 * MIB, 3 * MIB, 4 * MIB)]
    for i in order:
        allocator.free(blocks[i])
    assert layout(allocator) == [[(20 * MIB, False)]]
    assert allocator.now == AllocatorBytes(0, 0, 20 * MIB)


def test_a_freed_block_merges_with_either_neighbour_alone():
    allocator = CachingAllocator()
    a, b, c, d = (allocator.allocate(size) for size in (2 * MIB, 3 * MIB, 4 * MIB, 5 * MIB))
    allocator.free(a)
    allocator.free(b)  # the one before is free
    assert layout(allocator) == [[(5 * MIB, False), (4 * MIB, True), (5 * MIB, True), (6 * MIB, False)]]
    allocator.free(d)  # the one after is free
    assert layout(allocator) == [[(5 * MIB, False), (4 * MIB, True), (11 * MIB, False)]]
    allocator.free(c)  # both are
    assert layout(allocator) == [[(20 * MIB, False)]]


def test_segments_do_not_merge():
    allocator = CachingAllocator()
    for block in [allocator.allocate(10 * MIB), allocator.allocate(10 * MIB)]:
        allocator.free(block)
    allocator.allocate(20 * MIB)
    assert layout(allocator) == [[(10 * MIB, False)], [(10 * MIB, False)], [(20 * MIB, True)]]


def test_the_pools_share_nothing():
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(20 * MIB))
    small = allocator.allocate(1 * MIB)
    assert allocator.reserved_bytes == (20 + 2) * MIB
    allocator.free(small)
    allocator.allocate(2 * MIB)
    assert allocator.reserved_bytes == (20 + 2) * MIB
    assert layout(allocator) == [[(2 * MIB, True), (18 * MIB, False)], [(2 * MIB, False)]]


def test_a_freed_block_is_used_again_at_once():
    allocator = CachingAllocator()
    for _ in range(3):
        allocator.free(allocator.allocate(30 * MIB))
    assert allocator.peak == AllocatorBytes(30 * MIB, 30 * MIB, 30 * MIB)
    assert layout(allocator) == [[(30 * MIB, False)]]


def test_empty_cache_releases_whole_free_segments_only():
    allocator = CachingAllocator()
    allocator.allocate(3 * MIB)
    free = [allocator.allocate(size) for size in (4 * MIB, 30 * MIB, 512)]
    for block in free:
        allocator.free(block)
    assert allocator.reserved_bytes == (20 + 30 + 2) * MIB
    allocator.empty_cache()
    assert layout(allocator) == [[(3 * MIB, True), (17 * MIB, False)]]
    assert allocator.reserved_bytes == 20 * MIB
    allocator.allocate(17 * MIB)  # what was not released can still be used
    assert allocator.reserved_bytes == 20 * MIB


def test_peaks_restart_from_what_is_held():
    allocator = CachingAllocator()
    kept, freed = allocator.allocate(100), allocator.allocate(12 * MIB)
    allocator.free(freed)
    allocator.reset_peaks()
    assert allocator.peak == AllocatorBytes(100, 512, (2 + 12) * MIB)
    allocator.free(allocator.allocate(11 * MIB))
    assert allocator.peak == AllocatorBytes(100 + 11 * MIB, 512 + 12 * MIB, (2 + 12) * MIB)
    allocator.free(kept)
    assert allocator.now == AllocatorBytes(0, 0, (2 + 12) * MIB)


# --- the limit


def test_the_limit_may_be_reached_and_not_passed():
    allocator = CachingAllocator(limit_bytes=22 * MIB)
    allocator.allocate(3 * MIB)
    allocator.allocate(1)
    assert (allocator.reserved_bytes, allocator.retries, allocator.ooms) == (22 * MIB, 0, 0)
    # 17 MiB of the segment of 20 are free, which is too little.
    with pytest.raises(OutOfMemory, match=f"needs a segment of {18 * MIB} bytes, and {22 * MIB} bytes of the limit"):
        allocator.allocate(18 * MIB)
    assert (allocator.retries, allocator.ooms) == (1, 1)
    assert allocator.now == AllocatorBytes(3 * MIB + 1, 3 * MIB + 512, 22 * MIB)


def test_at_the_limit_the_cache_of_both_pools_is_released():
    allocator = CachingAllocator(limit_bytes=32 * MIB)
    for block in [allocator.allocate(10 * MIB), allocator.allocate(20 * MIB), allocator.allocate(1)]:
        allocator.free(block)
    allocator.reset_peaks()
    allocator.allocate(32 * MIB)
    assert allocator.now == AllocatorBytes(32 * MIB, 32 * MIB, 32 * MIB)
    assert allocator.peak.reserved_bytes == 32 * MIB  # before and after, never together
    assert (allocator.retries, allocator.ooms) == (1, 0)


def test_a_segment_in_part_in_use_cannot_be_released():
    allocator = CachingAllocator(limit_bytes=32 * MIB)
    a, b = allocator.allocate(9 * MIB), allocator.allocate(2 * MIB)
    allocator.free(a)
    allocator.free(allocator.allocate(12 * MIB))
    # 18 of the 20 MiB and all of the 12 are free; releasing the 12 leaves 12, and 14 are needed.
    with pytest.raises(OutOfMemory):
        allocator.allocate(13 * MIB + 1)
    assert allocator.now == AllocatorBytes(2 * MIB, 2 * MIB, 20 * MIB)
    assert (allocator.retries, allocator.ooms) == (1, 1)
    allocator.free(b)
    allocator.allocate(13 * MIB + 1)  # now the 20 MiB are one free block, which suffices
    assert allocator.now == AllocatorBytes(13 * MIB + 1, 13 * MIB + 512, 20 * MIB)
    assert (allocator.retries, allocator.ooms) == (1, 1)


# --- bad use


def test_misuse_is_an_error():
    with pytest.raises(InputError, match="the limit must be 0 bytes or more, got -1"):
        CachingAllocator(limit_bytes=-1)
    allocator = CachingAllocator()
    with pytest.raises(ValueError, match="cannot allocate -1 bytes"):
        allocator.allocate(-1)
    block = allocator.allocate(1)
    allocator.free(block)
    with pytest.raises(ValueError, match="is free already"):
        allocator.free(block)
    with pytest.raises(ValueError, match="storage 7 has 512 bytes and cannot lose 513"):
        Replay(allocator).feed([Event(7, 512, "forward"), Event(7, -513, "forward")])
    for span in ((0, 2), (-1, 1), (1, 0)):
        with pytest.raises(ValueError, match="a span must lie within the log of 1 events"):
            peaks_between([Event(0, 512, "forward")], [span])


# --- logs

LOG = [
    Event(0, 12 * MIB, "load"),
    Event(1, 100, "forward"),
    Event(2, 2 * MIB, "forward"),
    Event(2, -2 * MIB, "forward"),
    Event(3, 3 * MIB, "backward"),
    Event(1, -100, "backward"),
    Event(4, 1 * MIB + 1, "forward"),
    Event(3, -3 * MIB, "optimizer"),
]


def peaks_by_phase(log, allocator=None):
    """The peaks of each phase, all stretches of it taken together."""
    ends = [i for i in range(1, len(log) + 1) if i == len(log) or log[i].phase != log[i - 1].phase]
    found = {}
    spans = [*pairwise([0, *ends])]
    for (start, _), peak in zip(spans, peaks_between(log, spans, allocator), strict=True):
        before = found.setdefault(log[start].phase, peak)
        found[log[start].phase] = AllocatorBytes(*map(max, before, peak))
    return found


def test_the_changes_in_allocated_bytes_are_those_of_whole_blocks():
    assert Replay(CachingAllocator()).feed(LOG) == [
        12 * MIB,
        512,
        2 * MIB,
        -2 * MIB,
        3 * MIB,
        -512,
        1 * MIB + 512,
        -3 * MIB,
    ]


def test_peaks_of_a_log_by_phase():
    # 12 MiB have their own segment, the 100 bytes one of 2 MiB, and those between 1 and 10 MiB share one of 20.
    assert peaks_by_phase(LOG) == {
        "load": AllocatorBytes(12 * MIB, 12 * MIB, 12 * MIB),
        # Requested and allocated are most in the second stretch, when storages 0, 3 and 4 live.
        "forward": AllocatorBytes(
            12 * MIB + 3 * MIB + 1 * MIB + 1, 12 * MIB + 3 * MIB + 1 * MIB + 512, (12 + 2 + 20) * MIB
        ),
        "backward": AllocatorBytes(12 * MIB + 100 + 3 * MIB, 12 * MIB + 512 + 3 * MIB, (12 + 2 + 20) * MIB),
        # What was held at its start counts.
        "optimizer": AllocatorBytes(
            12 * MIB + 3 * MIB + 1 * MIB + 1, 12 * MIB + 3 * MIB + 1 * MIB + 512, (12 + 2 + 20) * MIB
        ),
    }


def test_peaks_of_spans_that_overlap_touch_and_are_empty():
    spans = [(1, 4), (0, 8), (2, 2), (3, 5), (8, 8), (0, 0)]
    assert peaks_between(LOG, spans) == [
        AllocatorBytes(14 * MIB + 100, 14 * MIB + 512, 34 * MIB),
        AllocatorBytes(16 * MIB + 1, 16 * MIB + 512, 34 * MIB),
        AllocatorBytes(12 * MIB + 100, 12 * MIB + 512, 14 * MIB),
        AllocatorBytes(15 * MIB + 100, 15 * MIB + 512, 34 * MIB),
        AllocatorBytes(13 * MIB + 1, 13 * MIB + 512, 34 * MIB),
        AllocatorBytes(0, 0, 0),
    ]
    assert peaks_between(LOG, []) == []


def test_a_log_is_fed_to_an_allocator_that_holds_something():
    allocator = held(9 * MIB)
    # 11 of the 20 MiB are free: the 3 MiB fit in there, and the 12 have a segment of their own.
    peaks = peaks_by_phase([Event(0, 12 * MIB, "forward"), Event(1, 3 * MIB, "forward")], allocator)
    assert peaks == {"forward": AllocatorBytes(24 * MIB, 24 * MIB, 32 * MIB)}
    assert layout(allocator) == [[(9 * MIB, True), (3 * MIB, True), (8 * MIB, False)], [(12 * MIB, True)]]


def test_a_storage_that_grows_in_place_holds_both_blocks_for_an_instant():
    log = [Event(0, 12 * MIB, "a"), Event(0, 10 * MIB, "a"), Event(0, -8 * MIB, "b"), Event(0, -14 * MIB, "b")]
    allocator = CachingAllocator()
    assert peaks_by_phase(log, allocator) == {
        "a": AllocatorBytes((12 + 22) * MIB, (12 + 22) * MIB, (12 + 22) * MIB),
        # 14 MiB do not fit into the 12 that are free: a third segment, and then 12 + 22 MiB are free.
        "b": AllocatorBytes((22 + 14) * MIB, (22 + 14) * MIB, (12 + 22 + 14) * MIB),
    }
    assert layout(allocator) == [[(12 * MIB, False)], [(22 * MIB, False)], [(14 * MIB, False)]]


def test_a_storage_without_bytes_can_gain_some():
    log = [Event(0, 0, "a"), Event(0, 100, "a"), Event(0, -100, "a"), Event(0, 200, "a"), Event(0, -200, "a")]
    assert peaks_by_phase(log) == {"a": AllocatorBytes(200, 512, 2 * MIB)}


def test_out_of_memory_names_the_phase():
    log = [Event(0, 12 * MIB, "forward"), Event(1, 12 * MIB, "backward")]
    with pytest.raises(OutOfMemory) as error:
        peaks_by_phase(log, CachingAllocator(limit_bytes=22 * MIB))
    assert error.value.phase == "backward"
    assert peaks_by_phase(log, CachingAllocator(limit_bytes=24 * MIB))["backward"].reserved_bytes == 24 * MIB


def test_a_trackers_own_log_can_be_replayed():
    with Tracker() as tracker:
        with tracker.phase("forward"):
            weight = torch.zeros(3 * MIB // 4)
            product = weight * 2  # 3 MiB more
        with tracker.phase("backward"):
            del weight
            total = product.sum()  # 4 bytes
    allocator = CachingAllocator()
    peaks = peaks_by_phase(tracker.events, allocator)
    assert peaks["forward"] == AllocatorBytes(6 * MIB, 6 * MIB, 20 * MIB)
    assert allocator.now == AllocatorBytes(3 * MIB + 4, 3 * MIB + 512, 22 * MIB)
    assert total.item() == 0


# --- figures that others published


def test_the_reserved_bytes_of_pytorch_issue_34330():
    """https://github.com/pytorch/pytorch/issues/34330 prints `memory_cached` (now `memory_reserved`) on a real card.

    Two convolutions and a group norm without parameters on 2 x 100 x 256 x 256 floats, under no_grad. Every tensor of
    the script is here; the figures leave room for no workspace.
    """
    allocator = CachingAllocator()
    printed = []
    for channels in (100, 200):
        allocator.allocate(200 * channels * 3 * 3 * 4)  # 0.69 MiB: small pool; 1.37 MiB: large pool
        allocator.allocate(200 * 4)
    allocator.allocate(2 * 100 * 256 * 256 * 4)
    printed.append(allocator.reserved_bytes)
    image = 2 * 200 * 256 * 256 * 4
    z = allocator.allocate(image)
    printed.append(allocator.reserved_bytes)
    z, old = allocator.allocate(image), z
    allocator.free(old)
    printed.append(allocator.reserved_bytes)
    allocator.empty_cache()
    for _ in ("mean", "rstd"):
        allocator.allocate(2 * 4 * 4)
    z, old = allocator.allocate(image), z
    allocator.free(old)
    printed.append(allocator.reserved_bytes)
    assert [f"{n / 1e6}M" for n in printed] == ["75.497472M", "180.355072M", "285.212672M", "285.212672M"]


def test_the_reserved_bytes_of_pytorch_issue_69526():
    """https://github.com/pytorch/pytorch/issues/69526: a convolution and two max pools on 512 x 3 x 224 x 224 floats.

    It reports 294 MB allocated and 296 MB reserved before the forward pass, and 5014 MB reserved after it. A max pool
    makes its values and their 8-byte indices, which are dropped when it returns; its input is dropped after it.
    """
    allocator = CachingAllocator()
    for floats in (28 * 3 * 3 * 3, 28, 512 * 3 * 224 * 224):  # weight, bias, input
        allocator.allocate(floats * 4)
    assert (allocator.allocated_bytes // MIB, allocator.reserved_bytes // MIB) == (294, 296)
    x = allocator.allocate(512 * 28 * 222 * 222 * 4)
    for side in (111, 56):
        values = allocator.allocate(512 * 28 * side * side * 4)
        allocator.free(allocator.allocate(512 * 28 * side * side * 8))
        allocator.free(x)
        x = values
    assert allocator.reserved_bytes == 5014 * MIB


# --- against a slow twin


class SlowAllocator:
    """The same rules with nothing but one list of segments, each a list of [size, requested], searched from end to end.

    Every figure is counted afresh. A segment is [address, small, blocks]; a free block requests 0.
    """

    def __init__(self, limit, ascending):
        self.limit, self.ascending = limit, ascending
        self.segments, self.obtained, self.retries, self.ooms = [], 0, 0, 0
        self.peak = (0, 0, 0)

    def now(self):
        blocks = [block for _, _, blocks in self.segments for block in blocks]
        return (
            sum(requested for _, requested in blocks),
            sum(size for size, requested in blocks if requested),
            sum(size for size, _ in blocks),
        )

    def allocate(self, requested):
        size = requested if requested % 512 == 0 else requested + 512 - requested % 512
        small = size <= MIB
        found = self.search(size, small)
        if found is None:
            if small:
                total = 2 * MIB
            elif size < 10 * MIB:
                total = 20 * MIB
            else:
                total = size if size % (2 * MIB) == 0 else size + 2 * MIB - size % (2 * MIB)
            if self.limit is not None and self.now()[2] + total > self.limit:
                self.retries += 1
                self.segments = [s for s in self.segments if len(s[2]) > 1 or s[2][0][1]]
                if self.now()[2] + total > self.limit:
                    self.ooms += 1
                    return None
            self.obtained += total
            address = self.obtained - total if self.ascending else -self.obtained
            self.segments.append([address, small, [[total, 0]]])
            found = self.search(size, small)
        blocks, i = found
        rest = blocks[i][0] - size
        if (small and rest >= 512) or rest > MIB:
            blocks[i : i + 1] = [[size, 0], [rest, 0]]
        blocks[i][1] = requested
        self.peak = tuple(map(max, self.peak, self.now()))
        return blocks[i]

    def search(self, size, small):
        best = None
        for address, is_small, blocks in self.segments:
            at = address
            for i, (block_size, requested) in enumerate(blocks):
                fits = is_small == small and not requested and block_size >= size
                if fits and (best is None or (block_size, at) < best[0]):
                    best = ((block_size, at), blocks, i)
                at += block_size
        return None if best is None else best[1:]

    def free(self, block):
        block[1] = 0
        for segment in self.segments:
            merged = []
            for other in segment[2]:
                if merged and not other[1] and not merged[-1][1]:
                    merged[-1] = [merged[-1][0] + other[0], 0]
                else:
                    merged.append(other)
            segment[2] = merged


def any_size(draw):
    """A request: small, about 1 MiB, below 10 MiB, about 10 MiB, or beyond; often at a boundary exactly."""
    kind = draw.randrange(5)
    if kind == 0:
        return draw.randint(1, 20 * KIB)
    if kind == 1:
        return 1 * MIB + draw.choice([-512 * KIB, -513, -512, -511, 0, 1, 512])
    if kind == 2:
        return draw.randint(MIB + 1, 10 * MIB)
    if kind == 3:
        return 10 * MIB + draw.choice([-513, -512, -511, -1, 0, 1, 512, MIB - 512, MIB - 511, MIB, 2 * MIB])
    return draw.randint(10 * MIB, 40 * MIB)


@pytest.mark.parametrize("limit", [None, 300 * MIB, 150 * MIB])
@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_random_logs_against_the_slow_twin(seed, ascending, limit):
    draw = random.Random(seed)
    allocator, twin = CachingAllocator(limit, ascending=ascending), SlowAllocator(limit, ascending)
    live = []
    for step in range(400):
        if step % 100 == 50:
            allocator.reset_peaks()
            twin.peak = twin.now()
        # Blocks pile up and go again in turn.
        if live and draw.random() < (0.35 if step % 200 < 120 else 0.7):
            pair = live.pop(draw.randrange(len(live)))
            allocator.free(pair[0])
            twin.free(pair[1])
        else:
            requested = any_size(draw)
            expected = twin.allocate(requested)
            if expected is None:
                with pytest.raises(OutOfMemory):
                    allocator.allocate(requested)
            else:
                live.append((allocator.allocate(requested), expected))
        assert allocator.now == twin.now()
        assert allocator.peak == twin.peak
        assert [s.blocks for s in allocator.segments()] == [tuple(map(tuple, blocks)) for _, _, blocks in twin.segments]
    assert (allocator.retries, allocator.ooms) == (twin.retries, twin.ooms)
    if limit is not None:  # both ends of a retry were seen
        assert allocator.retries > allocator.ooms > 0


@pytest.mark.parametrize("seed", range(3))
def test_what_always_holds(seed):
    draw = random.Random(seed)
    allocator = CachingAllocator()
    live = []
    for _ in range(2000):
        if live and draw.random() < 0.5:
            allocator.free(live.pop(draw.randrange(len(live))))
        else:
            live.append(allocator.allocate(any_size(draw)))
        requested, allocated, reserved = allocator.now
        assert requested <= allocated <= reserved
    segments = allocator.segments()
    assert sum(segment.size_bytes for segment in segments) == allocator.reserved_bytes
    assert sum(size for segment in segments for size, _ in segment.blocks) == allocator.reserved_bytes
    assert sum(size for s in segments for size, requested in s.blocks if requested) == allocator.allocated_bytes
    assert sum(requested for s in segments for _, requested in s.blocks) == allocator.requested_bytes
    sizes = [segment.size_bytes for segment in segments]
    for block in live:
        allocator.free(block)
    assert allocator.now == AllocatorBytes(0, 0, sum(sizes))
    assert layout(allocator) == [[(size, False)] for size in sizes]
    allocator.empty_cache()
    assert allocator.now == AllocatorBytes(0, 0, 0)
    assert allocator.segments() == []
