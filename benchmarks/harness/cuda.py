"""The CUDA caching allocator's statistics, phase by phase, and its history. On CUDA live bytes are ALLOCATED bytes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.harness.caching_allocator import AllocatorBytes
from benchmarks.harness.errors import InputError

MIB = 2**20


class AllocatorMeter:
    """What the caching allocator of one device held at most in the phases of some work, and what it was short of.

    `peaks` has the most of each figure by phase, what is resident included. `retries` and `ooms` are the
    `num_alloc_retries` and `num_ooms` of all phases together: how often the device was full until the cache was given
    back, and in spite of that.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.peaks: dict[str, AllocatorBytes] = {}
        self.retries = self.ooms = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Peaks restart before, from what is held, and are read after; kernels are waited for at both ends.

        Raises `InputError` where torch is set to allocate in a way that leaves the statistics at zero.
        """
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_stats(self.device)
        yield
        torch.cuda.synchronize(self.device)
        after = torch.cuda.memory_stats(self.device)
        found = AllocatorBytes(*(after[f"{figure}.all.peak"] for figure in AllocatorBytes._fields))
        if not found.requested_bytes:
            raise InputError(
                "torch's CUDA allocator kept no statistics: it must be the native one with its cache, so take backend "
                "out of PYTORCH_ALLOC_CONF and unset PYTORCH_NO_CUDA_MEMORY_CACHING"
            )
        self.peaks[name] = AllocatorBytes(*map(max, found, self.peaks.get(name, found)))
        self.retries += after["num_alloc_retries"] - before["num_alloc_retries"]
        self.ooms += after["num_ooms"] - before["num_ooms"]

    @property
    def peak(self) -> AllocatorBytes:
        """The most of each figure in any phase; the three need not have been reached together."""
        return AllocatorBytes(*map(max, zip(*self.peaks.values(), strict=True)))

    def live(self) -> int:
        """Allocated bytes now."""
        torch.cuda.synchronize(self.device)
        return torch.cuda.memory_allocated(self.device)


def release_unused(device: torch.device) -> None:
    """Have the allocator hold what tensors hold, and no more.

    cuBLAS keeps its workspaces, which the allocator counts, for as long as the process lives: without this, what comes
    next would depend on whether something multiplied matrices before it.
    """
    gc.collect()
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def hold_to(device: torch.device, limit_bytes: int) -> None:
    """Let the allocator have no more than `limit_bytes` of the device, as if there were no more; 0 or less: nothing.

    What is beyond is refused as the device would refuse it, after the cache was given back.
    """
    total = torch.cuda.get_device_properties(device).total_memory
    # Segments are whole MiB: half of one keeps the fraction's rounding from taking a byte of the last.
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, limit_bytes + MIB // 2) / total), device)


@contextmanager
def history(path: str | None) -> Iterator[None]:
    """Record what the allocator does and write it to `path` for torch's memory viewer; nothing where `path` is None.

    Written also where the work fails: memory that runs out is what one looks at most.
    """
    if path is None:
        yield
        return
    torch.cuda.memory._record_memory_history()
    try:
        yield
    finally:
        try:
            torch.cuda.memory._dump_snapshot(path)
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
