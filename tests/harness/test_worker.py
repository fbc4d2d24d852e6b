"""Workers: whatever happens to one is a record with a status, and no process is left behind."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.harness import process, worker
from benchmarks.harness.errors import InputError
from benchmarks.harness.protocol import Diverged
from benchmarks.harness.spec import RunSpec
from benchmarks.harness.worker import RunFailed, Worker, expected_environment, told
from reports.record import Record

SPEC = RunSpec(method="lora", budget=2, layer=(16, 24), batch=2, seq=4, rounds=1)
# A worker that answers every request with what it is given, and the spec's line with nothing.
ANSWER = "import sys; sys.stdin.readline(); [print({!r}, flush=True) for line in sys.stdin]"


def stand_in(monkeypatch, code):
    """Put a Python program in the worker's place."""
    monkeypatch.setattr(process, "process_command", lambda module: [sys.executable, "-c", code])


def failure(request="prepare", spec=SPEC, **options):
    """The record of the failure that a request ends in."""
    with Worker(spec, **options) as it, pytest.raises(RunFailed) as caught:
        getattr(it, request)()
    return caught.value.record


def test_a_run_in_a_process_of_its_own():
    with Worker(SPEC) as it:
        it.prepare()
        assert it.round() > 0
        plain, memory = it.plain(), it.memory()
    assert plain["touched_steps"] == 2 + 1
    assert plain["process_peak_bytes"] > memory["peak_step_bytes"]
    assert (memory["model"], memory["trainable_params"]) == ("layer 16x24", 2 * (16 + 24) + 24)
    assert memory["torch_version"]


def test_a_worker_keeps_the_memory_that_it_frees_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    with Worker(SPEC) as it:
        assert it.memory()["allocator"] == expected_environment(SPEC)["allocator"]
    assert "MALLOC_TRIM_THRESHOLD_=" in expected_environment(SPEC)["allocator"]
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "123456")
    with Worker(SPEC) as it:
        assert "MALLOC_TRIM_THRESHOLD_=123456" in it.memory()["allocator"]


def test_bytes_are_the_same_in_every_process():
    results = []
    for _ in range(2):
        with Worker(SPEC) as it:
            results.append(it.memory())
    first, second = results
    same = [name for name in first if name.endswith(("_bytes", "_params", "timeline"))]
    assert len(same) > 20
    assert {name: first[name] for name in same} == {name: second[name] for name in same}


def test_killed(monkeypatch):
    stand_in(monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    record = failure()
    assert record.status == "killed"
    assert "SIGKILL" in record.reason
    assert record.peak_step_bytes is None


def test_killed_between_two_requests():
    with Worker(SPEC) as it:
        it.prepare()
        os.kill(it._process.pid, signal.SIGKILL)
        with pytest.raises(RunFailed) as caught:
            it.round()
    assert caught.value.record.status == "killed"


def test_crashed(monkeypatch):
    stand_in(monkeypatch, "raise SystemError('the roof is off')")
    record = failure()
    assert record.status == "crashed"
    assert "the roof is off" in record.reason


@pytest.mark.parametrize("answer", ["", "[", "[]", "3", "{}", '{"failed": {"method": 1}}'])
def test_a_worker_that_gives_no_answer(monkeypatch, answer):
    stand_in(monkeypatch, ANSWER.format(answer))
    record = failure("round")
    assert record.status == "crashed"
    assert "no readable answer" in record.reason


def test_what_a_library_prints_is_no_answer(monkeypatch):
    noise = "import os, sys; from benchmarks.harness import worker, plain; "
    noise += "plain.PlainPass.round = lambda self: (print('progress'), os.write(1, b'more'), 0.5)[2]; worker.main()"
    monkeypatch.setattr(process, "process_command", lambda module: [sys.executable, "-c", noise, str(os.getpid())])
    with Worker(SPEC) as it:
        it.prepare()
        assert it.round() == 0.5


def test_a_worker_may_say_more_than_a_pipe_holds(monkeypatch):
    stand_in(monkeypatch, "import sys; sys.stderr.write('x' * 10**6); " + ANSWER.format('{"value": 7}'))
    with Worker(SPEC) as it:
        assert it.round() == 7


def test_a_worker_that_hangs_is_ended_with_its_children(monkeypatch, tmp_path):
    pid_file = tmp_path / "pid"
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    stand_in(monkeypatch, f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")
    started = time.monotonic()
    record = failure(time_limit_s=5)
    assert record.status == "timeout"
    assert "5 s" in record.reason
    assert time.monotonic() - started < 60
    assert _ends(int(pid_file.read_text()))


def test_the_time_limit_is_that_of_all_requests_together(monkeypatch):
    stand_in(monkeypatch, "import time; " + ANSWER.replace("[print", "[time.sleep(2) or print").format('{"value": 1}'))
    with Worker(SPEC, time_limit_s=5) as it:
        it.round()
        it.round()
        with pytest.raises(RunFailed) as caught:
            it.round()
        assert caught.value.record.status == "timeout"
    with Worker(SPEC, time_limit_s=5) as it:
        for _ in range(3):
            it.renew()
            assert it.round() == 1


def test_a_worker_ends_when_it_is_closed(monkeypatch):
    stand_in(monkeypatch, "import time; time.sleep(600)")
    with Worker(SPEC) as it:
        pid = it._process.pid
    assert _ends(pid)


def test_a_worker_ends_with_its_parent(tmp_path):
    pid_file = tmp_path / "pid"
    hang = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = f"from benchmarks.harness import worker; worker.serve = lambda *_: exec({hang!r}); worker.main()"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from benchmarks.harness import process, worker; import sys; "
            f"process.process_command = lambda module: [sys.executable, '-c', {code!r}, str(process.os.getpid())]; "
            "worker.Worker(worker.RunSpec(method='full', layer=(2, 3))).prepare()",
        ]
    )
    for _ in range(300):
        if pid_file.exists() and pid_file.read_text():
            break
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    assert _ends(int(pid_file.read_text()))


def test_a_worker_whose_parent_is_gone_before_it_asks_ends():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    orphan = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.harness.worker", str(gone.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    # Its standard input stays open: only the missing parent can end it.
    assert orphan.wait(timeout=120) == 1
    assert orphan.communicate()[0] == b""


def test_a_failed_record_carries_what_was_asked_for(monkeypatch):
    stand_in(monkeypatch, "raise SystemError")
    asked = {"model": "gpt2", "attention": "eager", "data": "movie", "device": "cuda", "threads": 3}
    record = failure(spec=RunSpec(method="full", **asked))
    assert {name: getattr(record, name) for name in asked} == asked
    assert record.device_semantics == "cuda"
    assert record.device_name is None  # never asked, and not the processor's
    assert record.timed_steps is None  # nothing was timed


def test_no_time_limit(monkeypatch):
    stand_in(monkeypatch, "raise SystemError")
    assert failure(time_limit_s=math.inf).status == "crashed"


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
        (MemoryError(), "oom"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "oom"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 99 bytes"), "oom"),
        (InputError("not so"), "refused"),
        (Diverged("the loss is nan"), "diverged"),
    ],
)
def test_what_goes_wrong_is_told(error, status):
    record = told(SPEC, error)
    assert record.status == status
    assert "\n" not in record.reason


def test_a_cuda_device_that_is_full_is_told_in_one_sentence(monkeypatch):
    def fill(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 1.95 GiB. GPU 0 has a total capacity of 14.57 GiB of which 1.58 GiB "
            "is free. Process 2493055 has 12.02 GiB memory in use. If reserved but unallocated memory is large try "
            "setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
        )

    monkeypatch.setattr(worker, "measure_memory", fill)
    answers = io.StringIO()
    worker.serve(io.StringIO(f'{json.dumps(SPEC.to_dict())}\n"memory"\n"memory"\n'), answers)
    (answer,) = answers.getvalue().splitlines()  # the first request ends the worker
    record = Record.from_dict(json.loads(answer)["failed"])
    assert record.status == "oom"
    assert record.reason == (
        "CUDA out of memory; Tried to allocate 1.95 GiB; "
        "GPU 0 has a total capacity of 14.57 GiB of which 1.58 GiB is free"
    )
    assert record.peak_step_bytes is None


def test_a_bug_is_not_hidden():
    with pytest.raises(RuntimeError, match="shapes differ"):
        told(SPEC, RuntimeError("shapes differ"))


def test_what_a_method_cannot_do_is_refused():
    record = failure(spec=RunSpec(method="lora", budget=17, layer=(16, 24), batch=1, seq=1))
    assert record.status == "refused"
    assert "at most 16" in record.reason


def test_a_spec_survives_json():
    spec = replace(SPEC, snapshot="steps.pickle")
    assert RunSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
