"""What NVIDIA's driver charges this process, as the management library (NVML) tells it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

NOT_AVAILABLE = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE in an unsigned field


def process_bytes(device: torch.device) -> int | None:
    """Bytes of `device` that this process takes: the allocator's segments, the CUDA context, libraries' own memory.

    None where it is not told: without pynvml, a driver or the permission, or where a container hides the process's id.
    """

    def ask(pynvml: ModuleType) -> Sequence[object]:
        handle = _handle(pynvml, torch.cuda.get_device_properties(device))
        return pynvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)

    processes = _asked(ask) or ()
    charged = next((process.usedGpuMemory for process in processes if process.pid == os.getpid()), None)
    return None if charged == NOT_AVAILABLE else charged


def driver_version() -> str | None:
    """The version of NVIDIA's driver; None where it is not told. No CUDA context is made for it."""
    return _asked(lambda pynvml: pynvml.nvmlSystemGetDriverVersion())


def _asked(question: Callable[[ModuleType], object]) -> object:
    """What NVML answers; None where there is none, or it does not tell."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            return question(pynvml)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def _handle(pynvml: ModuleType, properties: torch.cuda._CudaDeviceProperties) -> object:
    """NVML's handle of torch's device; not by its index, which CUDA_VISIBLE_DEVICES shifts and NVML does not know."""
    # torch leaves out the prefix, which tells a whole GPU from an instance of one.
    for prefix in ("GPU", "MIG"):
        try:
            return pynvml.nvmlDeviceGetHandleByUUID(f"{prefix}-{properties.uuid}")
        except pynvml.NVMLError:
            continue
    address = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    return pynvml.nvmlDeviceGetHandleByPciBusId(address)
