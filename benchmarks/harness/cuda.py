"""The CUDA allocator's statistics, phase by phase. On CUDA live bytes are ALLOCATED bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class AllocatorMeter:
    """Peaks of the caching allocator on one device, by phase; each phase's peak includes what is resident."""

    device: torch.device
    allocated: dict[str, int] = field(default_factory=dict)
    requested: dict[str, int] = field(default_factory=dict)
    reserved: int = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The counters restart before and are read after; kernels are waited for at both ends."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        torch.cuda.synchronize(self.device)
        statistics = torch.cuda.memory_stats(self.device)
        self.allocated[name] = max(self.allocated.get(name, 0), statistics["allocated_bytes.all.peak"])
        self.requested[name] = max(self.requested.get(name, 0), statistics["requested_bytes.all.peak"])
        self.reserved = max(self.reserved, statistics["reserved_bytes.all.peak"])

    def live(self) -> int:
        """Allocated bytes now."""
        torch.cuda.synchronize(self.device)
        return torch.cuda.memory_allocated(self.device)
