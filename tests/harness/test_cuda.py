"""The measured run on CUDA, with stand-ins: scripted statistics, and the allocator's model fed by steps on the CPU."""

from types import SimpleNamespace

import pytest
import torch

from baselines.full import Full
from baselines.registry import methods
from benchmarks.harness import protocol, worker
from benchmarks.harness.caching_allocator import AllocatorBytes, CachingAllocator, Replay
from benchmarks.harness.cuda import AllocatorMeter, history, hold_to
from benchmarks.harness.errors import InputError
from benchmarks.harness.memory import Tracker
from benchmarks.harness.protocol import allocated_breakdown, measure_memory, track
from benchmarks.harness.spec import RunSpec
from benchmarks.harness.worker import Session
from reports.capacity import CONTEXT_BYTES
from reports.record import BREAKDOWN, PEAKS, Record

MIB = 2**20
CPU = torch.device("cpu")
LAYER = {"layer": (37, 53), "batch": 3, "seq": 11}
BLOCK = {"block": (48, 96), "batch": 2, "seq": 16}


def spec(method, **options):
    budget = 3 if methods()[method].knob else None
    return RunSpec(method=method, budget=budget, **{"calibration_steps": 2, "rounds": 0, **options})


def blocks(*sizes):
    """What the allocator takes for requests of these bytes: multiples of 512."""
    return sum((size + 511) // 512 * 512 for size in sizes)


# --- the meter


def statistics(requested, allocated, reserved, retries=0, ooms=0):
    peaks = {"requested_bytes": requested, "allocated_bytes": allocated, "reserved_bytes": reserved}
    return {
        **{f"{name}.all.peak": value for name, value in peaks.items()},
        "num_alloc_retries": retries,
        "num_ooms": ooms,
    }


@pytest.fixture
def script(monkeypatch):
    """(answers, calls): what `memory_stats` gives, call by call, and what torch.cuda was asked."""
    answers, calls = [], []

    def asked(name, answer=lambda: None):
        monkeypatch.setattr(torch.cuda, name, lambda device: calls.append((name, device)) or answer())

    asked("synchronize")
    asked("reset_peak_memory_stats")
    asked("memory_stats", lambda: answers.pop(0))
    return answers, calls


def test_a_phase_is_metered_between_two_waits(script):
    answers, calls = script
    answers += [statistics(9, 9, 9), statistics(100, 512, 2 * MIB)]
    device = torch.device("cuda", 3)
    meter = AllocatorMeter(device)
    with meter.phase("forward"):
        calls.append(("work", device))
    names = ["synchronize", "reset_peak_memory_stats", "memory_stats", "work", "synchronize", "memory_stats"]
    assert calls == [(name, device) for name in names]
    assert meter.peaks == {"forward": AllocatorBytes(100, 512, 2 * MIB)}


def test_each_figure_has_its_own_peak_over_steps_and_phases(script):
    answers, _ = script
    meter = AllocatorMeter(CPU)
    start = statistics(1, 1, 1)
    answers += [start, statistics(100, 900, 3000), start, statistics(500, 600, 4000), start, statistics(200, 800, 3500)]
    for name in ("forward", "backward", "forward"):
        with meter.phase(name):
            pass
    assert meter.peaks == {"forward": AllocatorBytes(200, 900, 3500), "backward": AllocatorBytes(500, 600, 4000)}
    assert meter.peak == AllocatorBytes(500, 900, 4000)


def test_retries_and_ooms_are_those_of_the_phases_alone(script):
    answers, _ = script
    meter = AllocatorMeter(CPU)
    for before, after in [((7, 2), (8, 2)), ((20, 5), (22, 6))]:
        answers += [statistics(1, 1, 1, *before), statistics(1, 1, 1, *after)]
        with meter.phase("forward"):
            pass
    assert (meter.retries, meter.ooms) == (1 + 2, 1)


def test_an_allocator_without_statistics_is_refused(script):
    answers, _ = script
    answers += [statistics(0, 512, 512)] * 2
    with pytest.raises(InputError, match="PYTORCH_ALLOC_CONF"), AllocatorMeter(CPU).phase("forward"):
        pass


# --- the history


@pytest.fixture
def recorder(monkeypatch):
    """The calls of torch's recorder, in their order."""
    calls = []
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda enabled="all": calls.append(enabled))
    monkeypatch.setattr(memory, "_dump_snapshot", calls.append)
    return calls


def test_the_history_is_written_when_the_work_is_done(recorder):
    with history("steps.pickle"):
        assert recorder == ["all"]
    assert recorder == ["all", "steps.pickle", None]


def test_the_history_is_written_when_memory_runs_out(recorder):
    with pytest.raises(torch.OutOfMemoryError), history("steps.pickle"):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert recorder == ["all", "steps.pickle", None]


def test_without_a_path_nothing_is_recorded(recorder):
    with history(None):
        pass
    assert recorder == []


# --- the breakdown


def done_and_metered(allocated):
    """A tracked pass, 4000 bytes in forward (3000 are activations) and 2500 in the optimizer, and a meter's peaks."""
    tracker = Tracker()
    with tracker:
        with tracker.phase("forward") as forward:
            held, passing = torch.zeros(3000, dtype=torch.uint8), torch.zeros(1000, dtype=torch.uint8)
            del passing
        tracker.mark("activation", held)
        del held
        with tracker.phase("optimizer") as optimizer:
            state, passing = torch.zeros(2000, dtype=torch.uint8), torch.zeros(500, dtype=torch.uint8)
            del passing
        tracker.mark("optimizer", state)
    meter = AllocatorMeter(CPU)
    meter.peaks = {name: AllocatorBytes(0, size, 0) for name, size in allocated.items()}
    return SimpleNamespace(tracker=tracker, spans={"forward": [forward], "optimizer": [optimizer]}), meter


def test_what_the_allocator_has_beyond_the_tracker_is_temporary():
    parts = allocated_breakdown(*done_and_metered({"forward": 4608, "optimizer": 2560}))
    assert parts.pop("peak_phase") == "forward"
    assert parts == dict.fromkeys(BREAKDOWN, 0) | {"activation_bytes": 3000, "temporary_bytes": 1000 + 608}


def test_the_breakdown_is_that_of_the_phase_in_which_the_allocator_has_its_peak():
    parts = allocated_breakdown(*done_and_metered({"forward": 4608, "optimizer": 5120}))
    assert parts.pop("peak_phase") == "optimizer"
    assert parts == dict.fromkeys(BREAKDOWN, 0) | {"optimizer_bytes": 2000, "temporary_bytes": 500 + 5120 - 2500}


def test_less_than_the_tracker_is_less_temporary_and_never_less_than_nothing():
    parts = allocated_breakdown(*done_and_metered({"forward": 3000, "optimizer": 2560}))
    assert (parts["activation_bytes"], parts["temporary_bytes"]) == (3000, 0)
    parts = allocated_breakdown(*done_and_metered({"forward": 2999, "optimizer": 2560}))
    assert {name: parts[name] for name in BREAKDOWN} == dict.fromkeys(BREAKDOWN)


# --- the whole pass


class ModelledDevice:
    """torch.cuda's allocator as its model, for all that is made on the CPU while it is entered.

    `library` is a block that a library holds from its first use on, until it is told to let go.
    """

    def __init__(self, monkeypatch):
        self.allocator = CachingAllocator()
        self.library = None
        self._tracker = Tracker()
        self._replay = Replay(self.allocator)
        self._fed = 0
        for name, answer in (
            ("synchronize", lambda _: self._catch_up()),
            ("reset_peak_memory_stats", lambda _: self.allocator.reset_peaks()),
            ("memory_stats", lambda _: self._statistics()),
            ("memory_allocated", lambda _: self.allocator.allocated_bytes),
            ("empty_cache", lambda: self._catch_up() or self.allocator.empty_cache()),
        ):
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self._let_go, raising=False)
        monkeypatch.setattr(protocol, "process_bytes", lambda device: 123 * MIB)

    def __enter__(self):
        return self._tracker.__enter__()

    def __exit__(self, *exception):
        self._tracker.__exit__(*exception)

    def hold(self, requested_bytes):
        self._catch_up()
        self.library = self.library or self.allocator.allocate(requested_bytes)

    def _let_go(self):
        self.allocator.free(self.library)
        self.library = None

    def _catch_up(self):
        self._replay.feed(self._tracker.events[self._fed :])
        self._fed = self._tracker.position

    def _statistics(self):
        return statistics(*self.allocator.peak, self.allocator.retries, self.allocator.ooms)


@pytest.fixture
def device(monkeypatch):
    return ModelledDevice(monkeypatch)


def metered(device, a_spec):
    """What the pass on CUDA gives for tensors on the CPU."""
    with device:
        return protocol._metered(a_spec, a_spec.workload())


def test_full_fine_tuning_of_a_layer_has_the_closed_form(device):
    d_in, d_out, tokens = 37, 53, 33
    result = metered(device, spec("full", **LAYER))
    weight, bias = 4 * d_out * d_in, 4 * d_out
    x, y = 4 * tokens * d_in, 4 * tokens * d_out
    resident = 3 * blocks(weight, bias) + blocks(4, 4)  # weight and bias, two moments, AdamW's two step counters
    held = resident + blocks(x, y, y)  # X, Y, dL/dY
    assert result["resident_bytes"] == resident
    assert result["peak_forward_bytes"] == result["peak_eval_bytes"] == held
    assert result["peak_backward_bytes"] == held + blocks(weight, bias, x)
    # AdamW's loop holds the root of the second moment and its corrected copy.
    top = held + blocks(weight, bias, weight, weight)
    assert (result["peak_optimizer_bytes"], result["peak_step_bytes"]) == (top, top)
    assert result["peak_phase"] == "optimizer"
    assert result["peak_preparation_bytes"] == blocks(weight, bias)
    requested = 3 * (weight + bias) + 2 * 4 + x + 2 * y + weight + bias + 2 * weight
    assert result["peak_requested_bytes"] == requested
    assert result["temporary_bytes"] == 2 * weight + top - requested
    assert result["peak_reserved_bytes"] == 2 * MIB  # one segment of the small pool
    assert (result["kernel_workspace_bytes"], result["preparation_workspace_bytes"]) == (0, 0)
    assert result["nvml_process_bytes"] == 123 * MIB
    assert (result["alloc_retries"], result["alloc_ooms"]) == (0, 0)


@pytest.mark.parametrize("method", ["full", "lora", "meprop-unified", "sparsegrad"])
def test_the_fields_of_a_record_add_up(method, device):
    a_spec = spec(method, **BLOCK)
    record = Record(method=method, model="block", **metered(device, a_spec))
    assert sum(getattr(record, name) for name in BREAKDOWN) == record.peak_step_bytes
    assert max(getattr(record, name) for name in PEAKS) == record.peak_step_bytes
    assert getattr(record, f"peak_{record.peak_phase}_bytes") == record.peak_step_bytes
    assert record.peak_requested_bytes <= record.peak_step_bytes <= record.peak_reserved_bytes
    assert record.kernel_workspace_bytes == 0
    # What is allocated is what is requested, rounded up: never less than the tracker has on the CPU.
    on_cpu = track(a_spec, a_spec.workload(), Tracker()).peaks()
    assert record.peak_requested_bytes == on_cpu["peak_step_bytes"]
    for name in (*PEAKS, "peak_eval_bytes", "peak_preparation_bytes", "resident_bytes", "temporary_bytes"):
        assert getattr(record, name) >= on_cpu[name], name
    assert record.peak_preparation_bytes < on_cpu["peak_preparation_bytes"] + 512 * 100


def test_what_a_library_holds_is_workspace(device, monkeypatch):
    workspace = 3 * MIB

    class WithLibrary(Full):
        def prepare(self, model, batches):
            super().prepare(model, batches)
            device.hold(workspace)
            torch.zeros(24 * MIB, dtype=torch.uint8)

    plain = metered(device, spec("full", **LAYER))
    monkeypatch.setattr(protocol, "get", lambda _: WithLibrary)
    result = metered(device, spec("full", **LAYER))
    for name in (*PEAKS, "peak_step_bytes", "peak_requested_bytes", "resident_bytes", "temporary_bytes"):
        assert result[name] == plain[name] + workspace
    assert (result["kernel_workspace_bytes"], result["preparation_workspace_bytes"]) == (workspace, workspace)
    # The segment for its block; that of what the preparation used and let go is given back before the steps.
    assert result["peak_reserved_bytes"] == plain["peak_reserved_bytes"] + 20 * MIB
    assert result["peak_preparation_bytes"] == plain["peak_preparation_bytes"] + workspace + 24 * MIB
    # What it holds from another pass is no part of this one.
    monkeypatch.setattr(protocol, "get", lambda _: Full)
    assert metered(device, spec("full", **LAYER)) == plain


def test_the_measured_steps_alone_are_recorded(device, monkeypatch, recorder):
    phase = AllocatorMeter.phase
    monkeypatch.setattr(AllocatorMeter, "phase", lambda self, name: recorder.append(name) or phase(self, name))
    metered(device, spec("full", snapshot="steps.pickle", **LAYER))
    steps = ["forward", "backward", "optimizer"]
    assert recorder == ["preparation", "all", *steps, "steps.pickle", None, "eval"]


def test_a_run_on_cuda_is_metered(monkeypatch):
    monkeypatch.setattr(protocol, "_metered", lambda a_spec, workload: {"metered": a_spec.device})
    assert measure_memory(RunSpec(method="full", device="cuda", layer=(2, 3)), None) == {"metered": "cuda"}


# --- a smaller card


@pytest.mark.parametrize(("limit", "fraction"), [(16 * 1024, 0.2), (80 * 1024, 1.0), (-5, 0.0)])
def test_the_allocator_is_held_to_a_smaller_card(limit, fraction, monkeypatch):
    total, asked = 80 * 1024 * MIB, []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=total))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: asked.append(given))
    hold_to(CPU, limit * MIB)
    ((given, device),) = asked
    assert device == CPU
    # What torch makes of the fraction, whole bytes: no less than was asked for, and less than a MiB more.
    assert max(limit, 0) * MIB <= int(given * total) < max(limit, 0) * MIB + MIB
    assert given == pytest.approx(fraction, abs=1e-4)


def test_a_run_is_held_to_the_memory_that_its_spec_names(monkeypatch):
    held = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(worker, "hold_to", lambda *given: held.append(given))
    monkeypatch.setattr(RunSpec, "workload", lambda self: None)
    Session(spec("full", device="cuda", **LAYER))
    assert held == []
    Session(spec("full", device="cuda", gpu_memory_bytes=2**30, **LAYER))
    assert held == [(torch.device("cuda"), 2**30 - CONTEXT_BYTES)]
