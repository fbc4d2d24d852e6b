"""What a number was measured with: versions, machine, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import torch

from benchmarks.harness.nvml import driver_version

_ALLOCATOR_VARIABLES = ("GLIBC_TUNABLES", "LD_PRELOAD", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
ROOT = Path(__file__).resolve().parents[2]


def environment(device: str) -> dict[str, object]:
    """The environment fields of a record."""
    transformers = sys.modules.get("transformers")
    return {
        "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "python_version": platform.python_version(),
        "torch_version": torch.__version__,
        "transformers_version": getattr(transformers, "__version__", None),
        "platform": f"{platform.system()} {platform.machine()}",
        "device_name": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor(),
        "driver": driver_version() if device.startswith("cuda") else None,
        "threads": torch.get_num_threads(),
        "allocator": allocator(os.environ),
    }


def allocator(variables: Mapping[str, str]) -> str | None:
    """What these environment variables tell the C allocator and torch's; None where they tell them nothing."""
    names = sorted(name for name in variables if name.startswith("MALLOC_") or name in _ALLOCATOR_VARIABLES)
    return " ".join(f"{name}={variables[name]}" for name in names) or None


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def commit() -> str | None:
    """The suite's git commit, with -dirty where tracked files differ; None outside a repository."""
    try:
        head = _git("rev-parse", "HEAD")
        return f"{head}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()


def process_peak_bytes(pid: int | str = "self") -> int | None:
    """The resident set's high-water mark of a process; None where the system does not tell.

    /proc is asked, not getrusage: that one starts at the size of the process that forked this one.
    """
    return _kib(f"/proc/{pid}/status", "VmHWM:")


def available_bytes() -> int | None:
    """Memory that new processes can have without swapping; None where the system does not tell."""
    return _kib("/proc/meminfo", "MemAvailable:")


def _kib(path: str, name: str) -> int | None:
    """The bytes in a line `name NUMBER kB` of a file of the system's."""
    try:
        for line in Path(path).read_text(encoding="ascii").splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
