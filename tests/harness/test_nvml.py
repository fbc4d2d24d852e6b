"""What the driver charges the process, with a stand-in for NVML: devices by their UUID, None for what is not told."""

import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks.harness import nvml

OTHER, OURS = "c0ffee00-0000-1111-2222-333344445555", "00000000-aaaa-bbbb-cccc-dddddddddddd"
DEVICE = torch.device("cuda", 0)


class FakeNvml(ModuleType):
    """pynvml on a machine whose driver counts `OTHER` first, while CUDA sees `OURS` alone and calls it 0."""

    class NVMLError(Exception):
        """As pynvml's."""

    def __init__(self):
        super().__init__("pynvml")
        self.handles = {f"GPU-{OTHER}": "other", f"GPU-{OURS}": "ours"}
        self.addresses = {"00000000:03:00.0": "other", "00000001:a1:1f.0": "ours"}
        self.processes = {"other": [(os.getpid(), 111)], "ours": [(os.getpid() + 1, 222), (os.getpid(), 333)]}
        self.fails = None  # the function that raises
        self.opened = self.closed = 0

    def _call(self, name, table, key):
        if self.fails == name or key not in table:
            raise self.NVMLError(name)
        return table[key]

    def nvmlInit(self):
        self._call("init", {0: 0}, 0)
        self.opened += 1

    def nvmlShutdown(self):
        self.closed += 1

    def nvmlSystemGetDriverVersion(self):
        return self._call("driver", {0: "580.65.06"}, 0)

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return self._call("uuid", self.handles, uuid)

    def nvmlDeviceGetHandleByPciBusId(self, address):
        return self._call("address", self.addresses, address)

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle):
        found = self._call("processes", self.processes, handle)
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in found]


@pytest.fixture
def fake(monkeypatch):
    properties = SimpleNamespace(uuid=OURS, pci_domain_id=1, pci_bus_id=0xA1, pci_device_id=0x1F)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: {DEVICE: properties}[device])
    module = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    yield module
    assert module.closed == module.opened


def test_the_device_is_found_by_its_uuid_whatever_its_index(fake):
    fake.addresses.clear()
    assert nvml.process_bytes(DEVICE) == 333
    assert fake.opened == 1


def test_an_instance_of_a_gpu_is_found_by_its_uuid(fake):
    fake.handles = {f"MIG-{OURS}": "ours"}
    fake.addresses.clear()
    assert nvml.process_bytes(DEVICE) == 333


def test_a_device_of_unknown_uuid_is_found_by_its_address(fake):
    fake.fails = "uuid"
    assert nvml.process_bytes(DEVICE) == 333


def test_the_drivers_version(fake):
    assert nvml.driver_version() == "580.65.06"
    fake.fails = "driver"
    assert nvml.driver_version() is None
    fake.fails = "init"
    assert nvml.driver_version() is None


def test_a_device_that_nvml_does_not_know(fake):
    fake.handles.clear()
    fake.addresses.clear()
    assert nvml.process_bytes(DEVICE) is None
    assert fake.opened == 1


def test_a_process_that_is_not_listed(fake):
    fake.processes["ours"].pop()
    assert nvml.process_bytes(DEVICE) is None


@pytest.mark.parametrize("unknown", [None, 0xFFFF_FFFF_FFFF_FFFF])
def test_a_figure_that_is_not_available(unknown, fake):
    fake.processes["ours"] = [(os.getpid(), unknown)]
    assert nvml.process_bytes(DEVICE) is None


@pytest.mark.parametrize(("fails", "opened"), [("init", 0), ("processes", 1)])
def test_without_a_driver_or_permission(fails, opened, fake):
    fake.fails = fails
    assert nvml.process_bytes(DEVICE) is None
    assert fake.opened == opened


def test_without_pynvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.process_bytes(DEVICE) is None


def test_pynvml_has_what_is_called():
    pynvml = pytest.importorskip("pynvml")
    called = [name for name in vars(FakeNvml) if name.startswith("nvml")]
    assert [name for name in called if not callable(getattr(pynvml, name, None))] == []
    assert issubclass(pynvml.NVMLError, Exception)
    assert pynvml.NVML_VALUE_NOT_AVAILABLE_ulonglong.value == nvml.NOT_AVAILABLE
