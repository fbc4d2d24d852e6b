"""PyTorch's CUDA caching allocator as a model: what it allocates and reserves for the bytes that are requested of it.

It turns a log of requests and frees into the three figures of `torch.cuda.memory_stats`, now and at their peaks:
requested bytes, allocated bytes (`memory_allocated`: the blocks in use, each in its whole size) and reserved bytes
(`memory_reserved`: the segments held from the driver). No GPU is used, and no torch.

What is modelled: the native backend with its default settings, one device, one stream.
- A request is rounded up to a multiple of 512 bytes. One of zero bytes takes no block at all.
- Rounded sizes up to 1 MiB live in the small pool, the others in the large pool; the pools share nothing.
- The smallest free block of the pool that suffices is taken; of equal ones, that of the lowest address.
- Where none suffices, a segment is asked of the driver: 2 MiB for the small pool; for the large one 20 MiB for sizes
  below 10 MiB, else the size rounded up to a multiple of 2 MiB.
- The block found is split if 512 bytes or more (small pool), or MORE than 1 MiB (large pool), would remain. Otherwise
  it is handed out whole and counts as allocated whole: up to 1 MiB more than the rounded request.
- A freed block is free at once and merges with free neighbours of its segment. Segments stay reserved.
- At the limit (the card's memory, or the fraction allowed of it) every segment that is one free block goes back to the
  driver, of both pools, and the request is tried once more, which counts as a retry; then it is out of memory.

What is NOT modelled: several streams (`record_stream` delays a free), expandable segments, `max_split_size_mb`,
`roundup_power2_divisions`, `garbage_collection_threshold`, a `large_segment_size_mb` other than 20, private pools
(CUDA graphs, `MemPool`), the `cudaMallocAsync` backend, memory that does not come from this allocator (the CUDA
context, cuBLAS's own handles, NCCL), and fragmentation inside the driver. The driver also chooses the addresses of
segments, which decide between free blocks of equal size. Here each new segment lies below those before it. That is one
choice of two, and it was made with the five eager ones of the T4's measured rows (`measured.py`) in view, where it fits
better; of the five others, predicted afterwards, it gives four to the byte and one 0.3 % too high. With
`ascending=True` it lies above them, which shows how much hangs on the order: nothing of the requested bytes, nothing
of the allocated ones in the ten rows, up to 9 % of the reserved ones.

Source: c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h of PyTorch. The sizes below are those of the
header that torch 2.13 installs, which also has expandable segments, rounding to powers of two, a largest size to split
and garbage collection off by default. They date from 2019 (pytorch/pytorch#17120); since then #172056 (January 2026)
made the 20 MiB a setting, and 20 its default. Nothing found says that torch 2.11, 2.12 or 2.14 differ, but of these
only excerpts were read, not the whole source.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from benchmarks.harness.errors import InputError

MIB = 2**20

BLOCK_UNIT = 512  # every block is a multiple of this
SMALL_MOST = 1 * MIB  # the largest block of the small pool, and the largest remainder that the large one leaves whole
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB  # of the large pool, for blocks smaller than OWN_SEGMENT_LEAST
OWN_SEGMENT_LEAST = 10 * MIB  # from here on a segment is made to measure
SEGMENT_UNIT = 2 * MIB  # what a segment made to measure is a multiple of


class AllocatorBytes(NamedTuple):
    """The allocator's three figures at one instant, or the peak of each over some time."""

    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int


class Segment(NamedTuple):
    """A segment and its blocks in the order of addresses, each as (size, requested bytes); a free one requests 0."""

    size_bytes: int
    blocks: tuple[tuple[int, int], ...]


class OutOfMemory(RuntimeError):
    """The limit leaves no room for the segment that a request needs, even with the cache released.

    `phase` is that of the event, where a log was replayed.
    """

    phase: str | None = None


class Block:
    """A stretch of a segment. `allocate` hands one out; to its holder it means nothing once it is freed."""

    __slots__ = ("address", "after", "before", "free", "pool", "requested_bytes", "size_bytes")

    def __init__(self, address: int, size_bytes: int, pool: list[tuple[int, int, Block]]):
        self.address = address
        self.size_bytes = size_bytes
        self.pool = pool  # where it belongs when it is free
        self.before: Block | None = None  # neighbours in its segment
        self.after: Block | None = None
        self.free = True
        self.requested_bytes = 0


class CachingAllocator:
    """The allocator of one device.

    `limit_bytes` is the most that may be reserved: None for no limit. `requested_bytes`, `allocated_bytes` and
    `reserved_bytes` are what is held now; `retries` and `ooms` are `num_alloc_retries` and `num_ooms` of torch.
    `ascending` is the order of the segments' addresses, which the module's text explains.

    >>> allocator = CachingAllocator()
    >>> block = allocator.allocate(1000)
    >>> allocator.now
    AllocatorBytes(requested_bytes=1000, allocated_bytes=1024, reserved_bytes=2097152)
    >>> allocator.free(block)
    """

    def __init__(self, limit_bytes: int | None = None, *, ascending: bool = False):
        if limit_bytes is not None and limit_bytes < 0:
            raise InputError(f"the limit must be 0 bytes or more, got {limit_bytes}")
        self.limit_bytes = limit_bytes
        self.requested_bytes = self.allocated_bytes = self.reserved_bytes = 0
        self.retries = self.ooms = 0
        self._peak_requested = self._peak_allocated = self._peak_reserved = 0
        # Free blocks of each pool as (size, address, block), sorted. Lists of integer keys, or a list for each size,
        # were no more than a twentieth faster with a thousand free blocks and a seventh with ten thousand.
        self._small: list[tuple[int, int, Block]] = []
        self._large: list[tuple[int, int, Block]] = []
        self._first: dict[int, Block] = {}  # address of a segment -> its first block, which stays one object for life
        self._ascending = ascending
        self._edge = 0  # address at which the next segment ends or, ascending, begins

    # --- what is held

    @property
    def now(self) -> AllocatorBytes:
        """What is held now."""
        return AllocatorBytes(self.requested_bytes, self.allocated_bytes, self.reserved_bytes)

    @property
    def peak(self) -> AllocatorBytes:
        """The most of each figure since the peaks were reset; the three need not have been reached together."""
        return AllocatorBytes(self._peak_requested, self._peak_allocated, self._peak_reserved)

    def reset_peaks(self) -> None:
        """Peaks start again from what is held now, as `torch.cuda.reset_peak_memory_stats` does it."""
        self._peak_requested, self._peak_allocated, self._peak_reserved = self.now

    def segments(self) -> list[Segment]:
        """Every segment held, in the order in which they were obtained."""
        held = []
        for first in self._first.values():
            blocks = tuple((block.size_bytes, block.requested_bytes) for block in _from(first))
            held.append(Segment(sum(size for size, _ in blocks), blocks))
        return held

    # --- requests

    def allocate(self, requested_bytes: int) -> Block | None:
        """A block for that many bytes; None, a null pointer, for zero bytes.

        Raises OutOfMemory where the limit leaves no room; nothing but the cache, `retries` and `ooms` has changed then.
        """
        if requested_bytes <= 0:
            if requested_bytes == 0:
                return None
            raise ValueError(f"cannot allocate {requested_bytes} bytes")
        size = -(-requested_bytes // BLOCK_UNIT) * BLOCK_UNIT
        small = size <= SMALL_MOST
        pool = self._small if small else self._large
        best = bisect_left(pool, (size,))
        block = pool.pop(best)[2] if best < len(pool) else self._obtain_segment(size, pool)
        remainder = block.size_bytes - size
        if remainder >= BLOCK_UNIT if small else remainder > SMALL_MOST:
            self._split(block, size)
        block.free = False
        block.requested_bytes = requested_bytes
        self.requested_bytes += requested_bytes
        self.allocated_bytes += block.size_bytes
        if self.requested_bytes > self._peak_requested:
            self._peak_requested = self.requested_bytes
        if self.allocated_bytes > self._peak_allocated:
            self._peak_allocated = self.allocated_bytes
        return block

    def free(self, block: Block | None) -> None:
        """Give a block back to its pool, merged with the free blocks beside it; None is ignored."""
        if block is None:
            return
        if block.free:
            raise ValueError(f"the block at address {block.address} is free already")
        self.requested_bytes -= block.requested_bytes
        self.allocated_bytes -= block.size_bytes
        block.free = True
        block.requested_bytes = 0
        before, after = block.before, block.after
        if after is not None and after.free:
            self._withdraw(after)
            self._join(block, after)
        if before is not None and before.free:
            self._withdraw(before)
            self._join(before, block)
            block = before
        insort(block.pool, (block.size_bytes, block.address, block))

    def empty_cache(self) -> None:
        """Give every segment that is one free block back to the driver, as `torch.cuda.empty_cache` does."""
        for pool in (self._small, self._large):
            kept = []
            for entry in pool:
                size, address, block = entry
                if block.before is None and block.after is None:
                    del self._first[address]
                    self.reserved_bytes -= size
                else:
                    kept.append(entry)
            pool[:] = kept

    # --- blocks and segments

    def _obtain_segment(self, size: int, pool: list[tuple[int, int, Block]]) -> Block:
        """A new segment in which a block of `size` bytes fits, as one block that is in no pool yet."""
        segment = segment_bytes(size)
        if not self._fits(segment):
            self.empty_cache()
            self.retries += 1
            if not self._fits(segment):
                self.ooms += 1
                raise OutOfMemory(
                    f"out of memory: a block of {size} bytes needs a segment of {segment} bytes, and"
                    f" {self.reserved_bytes} bytes of the limit of {self.limit_bytes} are reserved"
                )
        address = self._edge if self._ascending else self._edge - segment
        self._edge = address + segment if self._ascending else address
        block = self._first[address] = Block(address, segment, pool)
        self.reserved_bytes += segment
        self._peak_reserved = max(self._peak_reserved, self.reserved_bytes)
        return block

    def _fits(self, segment: int) -> bool:
        return self.limit_bytes is None or self.reserved_bytes + segment <= self.limit_bytes

    def _split(self, block: Block, size: int) -> None:
        """Shorten a block that is in no pool to `size` bytes; the remainder behind it becomes a free block."""
        rest = Block(block.address + size, block.size_bytes - size, block.pool)
        rest.before, rest.after = block, block.after
        if rest.after is not None:
            rest.after.before = rest
        block.after = rest
        block.size_bytes = size
        insort(rest.pool, (rest.size_bytes, rest.address, rest))

    def _join(self, block: Block, after: Block) -> None:
        """Let a block take up the one behind it; neither is in a pool."""
        block.size_bytes += after.size_bytes
        block.after = after.after
        if block.after is not None:
            block.after.before = block

    def _withdraw(self, block: Block) -> None:
        del block.pool[bisect_left(block.pool, (block.size_bytes, block.address))]


def segment_bytes(size: int) -> int:
    """The segment that is asked of the driver for a block of `size` bytes, a multiple of 512."""
    if size <= SMALL_MOST:
        return SMALL_SEGMENT
    if size < OWN_SEGMENT_LEAST:
        return LARGE_SEGMENT
    return -(-size // SEGMENT_UNIT) * SEGMENT_UNIT


def _from(block: Block | None) -> Iterator[Block]:
    """A block and those behind it in its segment."""
    while block is not None:
        yield block
        block = block.after


# --- logs


class Replay:
    """Feeds a tracker's log of events (`memory.Event`) to an allocator.

    A storage that changes its size in place is a new block for the whole of it and then a free of the old one, since
    that is how CUDA's `resize_` does it: both exist for an instant.
    """

    def __init__(self, allocator: CachingAllocator):
        self.allocator = allocator
        self._live: dict[int, Block] = {}  # storage -> its block; a storage of zero bytes has none

    def feed(self, events: Iterable[tuple[int, int, str]]) -> list[int]:
        """Go on with these events, each (storage, change in bytes, phase); the change in allocated bytes of each.

        Raises OutOfMemory, and ValueError for a log in which a storage loses more bytes than it has.
        """
        allocate, free, live = self.allocator.allocate, self.allocator.free, self._live
        changes = []
        for storage, change, phase in events:
            if change == 0:
                changes.append(0)
                continue
            before = self.allocator.allocated_bytes
            old = live.get(storage)
            size = change if old is None else old.requested_bytes + change
            if size < 0:
                raise ValueError(f"storage {storage} has {size - change} bytes and cannot lose {-change}")
            try:
                new = allocate(size)
            except OutOfMemory as error:
                error.phase = phase
                raise
            free(old)
            if new is None:
                del live[storage]
            else:
                live[storage] = new
            changes.append(self.allocator.allocated_bytes - before)
        return changes


def peaks_between(
    events: Sequence[tuple[int, int, str]],
    spans: Sequence[tuple[int, int]],
    allocator: CachingAllocator | None = None,
) -> list[AllocatorBytes]:
    """The peaks of each span of a log, a span being two positions in it as `memory.Span` has them; spans may overlap.

    The log is replayed from its beginning to the last position. A span's peaks include what is held at its start, as
    they do when `torch.cuda.reset_peak_memory_stats` is called there. `allocator` may hold blocks already (a library's
    workspace) and can be asked afterwards for its segments and retries; by default it is a new one without a limit.

    Raises OutOfMemory where the allocator's limit does not suffice.
    """
    for start, end in spans:
        if not 0 <= start <= end <= len(events):
            raise ValueError(f"a span must lie within the log of {len(events)} events, got {start} to {end}")
    if allocator is None:
        allocator = CachingAllocator()
    replay = Replay(allocator)
    cuts = sorted({0, *(position for span in spans for position in span)})
    held, peaks = [allocator.now], []  # at each cut, and between each cut and the next
    for start, end in pairwise(cuts):
        allocator.reset_peaks()
        replay.feed(events[start:end])
        held.append(allocator.now)
        peaks.append(allocator.peak)
    found = []
    for start, end in spans:
        first, last = bisect_left(cuts, start), bisect_left(cuts, end)
        found.append(_most([held[first], *peaks[first:last]]))
    return found


def _most(figures: Sequence[AllocatorBytes]) -> AllocatorBytes:
    return AllocatorBytes(*map(max, zip(*figures, strict=True)))
