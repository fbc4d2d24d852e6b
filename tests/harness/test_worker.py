"""Workers: whatever happens to one is a record with a status, and no process is left behind."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.harness import worker
from benchmarks.harness.spec import RunSpec
from benchmarks.harness.worker import measure, run_in_process

SPEC = RunSpec(method="lora", budget=2, layer=(16, 24), batch=2, seq=4, timed_steps=1)


def stand_in(monkeypatch, code):
    """Put a Python program in the worker's place; it gets the result's path as its argument."""
    monkeypatch.setattr(worker, "worker_command", lambda result: [sys.executable, "-c", code, str(result)])


def test_a_run_in_a_process_of_its_own():
    record = run_in_process(SPEC)
    assert (record.status, record.method, record.budget, record.model) == ("ok", "lora", 2, "layer 16x24")
    assert record.trainable_params == 2 * (16 + 24) + 24
    assert record.process_peak_bytes > record.peak_step_bytes
    assert record.torch_version


def test_bytes_are_the_same_in_every_process():
    first, second = (run_in_process(SPEC).to_dict() for _ in range(2))
    same = [name for name in first if name.endswith(("_bytes", "_params")) and name != "process_peak_bytes"]
    assert len(same) > 20
    assert {name: first[name] for name in same} == {name: second[name] for name in same}


def test_killed(monkeypatch):
    stand_in(monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    record = run_in_process(SPEC)
    assert record.status == "killed"
    assert "SIGKILL" in record.reason
    assert record.peak_step_bytes is None


def test_crashed(monkeypatch):
    stand_in(monkeypatch, "raise SystemError('the roof is off')")
    record = run_in_process(SPEC)
    assert record.status == "crashed"
    assert "the roof is off" in record.reason


@pytest.mark.parametrize("left", ["", "[", "[]", '[{"method": 1}]'])
def test_a_worker_that_leaves_no_record(monkeypatch, left):
    stand_in(monkeypatch, f"import sys; open(sys.argv[1], 'w').write({left!r})")
    record = run_in_process(SPEC)
    assert record.status == "crashed"
    assert "no readable record" in record.reason


def test_a_worker_that_hangs_is_ended_with_its_children(monkeypatch, tmp_path):
    pid_file = tmp_path / "pid"
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    stand_in(monkeypatch, f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")
    started = time.monotonic()
    record = run_in_process(SPEC, time_limit_s=5)
    assert record.status == "timeout"
    assert "5 s" in record.reason
    assert time.monotonic() - started < 60
    assert _ends(int(pid_file.read_text()))


def test_a_worker_ends_with_its_parent(tmp_path):
    pid_file = tmp_path / "pid"
    hang = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = f"from benchmarks.harness import worker; worker.measure = lambda spec: exec({hang!r}); worker.main()"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from benchmarks.harness import worker; import sys; "
            f"worker.worker_command = lambda r: [sys.executable, '-c', {code!r}, str(r), str(worker.os.getpid())]; "
            "worker.run_in_process(worker.RunSpec(method='full', layer=(2, 3)))",
        ]
    )
    for _ in range(300):
        if pid_file.exists() and pid_file.read_text():
            break
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    assert _ends(int(pid_file.read_text()))


def test_a_worker_whose_parent_is_gone_before_it_asks_ends(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    command = [sys.executable, "-m", "benchmarks.harness.worker", str(tmp_path / "record.json"), str(gone.pid)]
    ended = subprocess.run(command, input=json.dumps(SPEC.to_dict()), text=True, timeout=120)
    assert ended.returncode == 1
    assert not (tmp_path / "record.json").exists()


def test_a_failed_record_carries_what_was_asked_for(monkeypatch):
    stand_in(monkeypatch, "raise SystemError")
    asked = {"model": "gpt2", "attention": "eager", "data": "movie", "device": "cuda", "threads": 3}
    record = run_in_process(RunSpec(method="full", **asked))
    assert {name: getattr(record, name) for name in asked} == asked
    assert record.device_semantics == "cuda"
    assert record.device_name is None  # never asked, and not the processor's
    assert record.timed_steps is None  # nothing was timed


def test_no_time_limit(monkeypatch):
    stand_in(monkeypatch, "raise SystemError")
    assert run_in_process(SPEC, time_limit_s=math.inf).status == "crashed"


def _ends(pid):
    for _ in range(100):
        if not _runs(pid):
            return True
        time.sleep(0.1)
    return False


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie whose parent is gone waits for init; it runs no more.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError("no more"), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 99 bytes"), "oom"),
    ],
)
def test_out_of_memory(monkeypatch, error, status):
    def fail(_):
        raise error

    monkeypatch.setattr(worker, "run", fail)
    assert measure(SPEC).status == status


def test_a_bug_is_not_hidden(monkeypatch):
    def fail(_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(worker, "run", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        measure(SPEC)


def test_what_a_method_cannot_do_is_refused():
    record = measure(RunSpec(method="lora", budget=17, layer=(16, 24), batch=1, seq=1))
    assert record.status == "refused"
    assert "at most 16" in record.reason


def test_a_spec_survives_json():
    assert RunSpec.from_dict(json.loads(json.dumps(SPEC.to_dict()))) == SPEC
