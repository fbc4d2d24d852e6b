"""The suite as its users run it: pytest in a process of its own, on cases small enough for a test."""

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path

import pytest

from benchmarks import cli, matrix
from benchmarks.harness.worker import expected_environment
from benchmarks.journal import Entry, Journal
from benchmarks.suite import StepClock, Suite
from reports.record import BREAKDOWN, Record, read

ROOT = Path(__file__).parents[1]

CONFTEST = """
from benchmarks.conftest import *
"""
# Runs without workers: what each does stands in script.json, and which were run is noted in ran.txt.
FAKE = """
import json, time
from pathlib import Path
from benchmarks.harness import turns

HERE = Path(__file__).parent

class FakeRun:
    crowded, pairing = False, "rounds"

    def __init__(self, spec, reference, limit, shares_memory):
        self.spec, self.seconds = spec, []
        self.told = json.loads((HERE / "script.json").read_text()).get(spec.method, {})

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    @property
    def rounds(self):
        return 0 if "status" in self.told else self.spec.rounds

    def prepare(self):
        pass

    def high_water_bytes(self):
        return 1

    def half_width(self):
        return None

    def pair(self, reference_first):
        if self.rounds:
            self.seconds.append(0.25 + len(self.seconds) / 8)

    def finish(self):
        from benchmarks.harness.worker import expected_environment
        with open(HERE / "ran.txt", "a") as log:
            log.write(self.spec.method + "\\n")
        time.sleep(self.told.get("sleep", 0))
        known = expected_environment(self.spec)
        times = {"timed_rounds": len(self.seconds), "peak_step_bytes": 2**20} if self.rounds else {}
        outcome = {"status": self.told["status"], "reason": "as told"} if "status" in self.told else times
        return self.spec.blank(self.spec.label(), **known, **outcome)

turns.Run, turns.available_bytes = FakeRun, lambda: 10
"""
CASES = """
import pytest

@pytest.mark.parametrize("method", {methods!r})
@pytest.mark.parametrize(("layer", "tokens", "dtype"), [("16x24", 16, "float32")])
def test_small(measured, layer, tokens, dtype, method):
    measured(method, layer=layer, tokens=tokens, dtype=dtype)

@pytest.mark.large
def test_too_large(measured):
    measured("full", layer="16x24", tokens=16, dtype="float32")
"""


class Bench:
    """A folder with small benchmarks, the way `benchmarks/` has large ones."""

    def __init__(self, folder: Path, methods=("full", "lora", "head"), fake=True, script=None):
        self.folder, self.methods = folder, methods
        self.out = folder / "results" / "out.json"
        self.partial = folder / "results" / "out.partial.json"
        (folder / "conftest.py").write_text(CONFTEST + FAKE * fake)
        (folder / "test_small.py").write_text(CASES.format(methods=list(methods)))
        self.tell(script or {})

    def tell(self, script):
        (self.folder / "script.json").write_text(json.dumps(script))

    def command(self, *options, json_path=None):
        base = [sys.executable, "-m", "pytest", str(self.folder), "--rootdir", str(self.folder)]
        base += ["-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
        base += ["--rounds", "3", "--timing-span", "0.3"]
        return [*base, f"--benchmark-json={json_path or self.out}", *options]

    def run(self, *options, **kwargs):
        done = subprocess.run(self.command(*options), capture_output=True, text=True, timeout=300, cwd=ROOT, **kwargs)
        self.said = done.stdout + done.stderr
        return done.returncode

    def ran(self):
        """The methods that were run since the last time this was asked."""
        log = self.folder / "ran.txt"
        methods = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return methods

    def entries(self):
        return {entry["extra_info"]["method"]: entry for entry in json.loads(self.out.read_text())["benchmarks"]}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """The suites that tests start are not part of a run that is spread over processes, though the tests may be."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_real_runs_end_in_pytest_benchmarks_json(tmp_path):
    bench = Bench(tmp_path, fake=False)
    assert bench.run() == 0, bench.said
    output = json.loads(bench.out.read_text())
    assert [record.method for record in read(bench.out)] == list(bench.methods)
    for record, entry in zip(read(bench.out), output["benchmarks"], strict=True):
        assert record.status == "ok"
        assert record.model == "layer 16x24"
        assert (record.batch, record.seq, record.pairing) == (4, 4, "rounds")
        assert sum(getattr(record, name) for name in BREAKDOWN) == record.peak_step_bytes
        # Flat: what a tracker of results can read.
        assert all(isinstance(value, int | float | str | None) for value in entry["extra_info"].values())
        assert entry["params"] == {"layer": "16x24", "tokens": 16, "dtype": "float32", "method": record.method}
        # In turns, 0.1 s from round to round.
        assert 0.2 <= record.timed_span_s
        # pytest-benchmark's statistics are of the worker's own clock.
        assert len(entry["stats"]["data"]) == record.timed_rounds == 3
        assert statistics.median(entry["stats"]["data"]) == pytest.approx(record.step_time_s, rel=1e-9)
    budgets = {record.method: (record.budget, record.matched, record.equal_trainable) for record in read(bench.out)}
    assert budgets == {"full": (None, False, "lora[7]"), "lora": (7, True, "lora[7]"), "head": (None, False, "lora[7]")}
    assert set(output["machine_info"]) == {
        "device", "device_name", "platform", "python_version", "threads", "torch_version"
    }  # fmt: skip
    assert not bench.partial.exists()
    assert "3 passed, 1 deselected" in bench.said
    assert cli.main(["report", str(bench.out), "--out", str(tmp_path / "report")]) == 0


def test_a_run_that_does_not_end_ok_is_in_the_json_with_its_status(tmp_path):
    script = {"lora": {"status": "oom"}, "head": {"status": "crashed"}, "meprop-weight": {"status": "refused"}}
    bench = Bench(tmp_path, ("full", "lora", "head", "meprop-weight"), script=script)
    # What the machine cannot do is a result; a crash is a defect.
    assert bench.run("-rxf") == 1
    assert "1 failed, 1 passed, 1 deselected, 2 xfailed" in bench.said
    assert "oom: as told" in bench.said
    assert "crashed: as told" in bench.said
    entries = bench.entries()
    assert list(entries) == ["full", "lora", "head", "meprop-weight"]
    assert [r.status for r in read(bench.out)] == ["ok", "oom", "crashed", "refused"]
    assert entries["full"]["stats"]["data"] == [0.25, 0.375, 0.5]
    for method in script:
        stats = entries[method]["stats"]
        # What it took to fail is no step's time.
        assert (stats["min"], stats["median"], stats["data"], stats["rounds"]) == (None, None, [], 0)
        assert set(stats) == set(entries["full"]["stats"])
        assert entries[method]["fullname"].endswith(f"test_small[16x24-16-float32-{method}]")


def test_a_suite_in_which_nothing_ends_ok_still_has_its_json(tmp_path):
    bench = Bench(tmp_path, ("full",), script={"full": {"status": "killed"}})
    assert bench.run() == 0
    assert [r.status for r in read(bench.out)] == ["killed"]


def interrupted(bench, sent, while_running="head"):
    """Start the suite, send it a signal while a method runs, and wait for its end."""
    process = subprocess.Popen(
        bench.command(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        # A shell starts what runs in its background with Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = bench.folder / "ran.txt"
    for _ in range(600):
        if log.exists() and while_running in log.read_text():
            break
        time.sleep(0.1)
    process.send_signal(sent)
    bench.said = process.communicate(timeout=120)[0]
    return process.returncode


def test_a_killed_suite_resumes_to_what_one_left_alone_gives(bench, tmp_path_factory):
    bench.tell({"head": {"sleep": 300}})
    assert interrupted(bench, signal.SIGKILL) == -signal.SIGKILL
    assert bench.ran() == ["full", "lora", "head"]
    assert not bench.out.exists()
    # What was complete is a results file already.
    assert [r.method for r in read(bench.partial)] == ["full", "lora"]
    bench.tell({})
    assert bench.run("--resume") == 0, bench.said
    assert bench.ran() == ["head"]
    assert "2 of 3 runs were taken from an earlier suite" in bench.said
    assert not bench.partial.exists()

    alone = Bench(tmp_path_factory.mktemp("alone"))
    assert alone.run() == 0

    def timeless(entries):
        return {m: (e["stats"], {**e["extra_info"], "created_at": None}) for m, e in entries.items()}

    assert timeless(bench.entries()) == timeless(alone.entries())
    # A suite that is complete has nothing left to run.
    assert bench.run("--resume") == 0
    assert bench.ran() == []
    assert timeless(bench.entries()) == timeless(alone.entries())


def test_an_interrupted_suite_keeps_what_was_complete_and_nothing_else(bench):
    bench.tell({"head": {"sleep": 300}})
    assert interrupted(bench, signal.SIGINT) == 2
    # The benchmarks of a case end together; what is complete of it stands in the partial file.
    assert not bench.out.exists()
    assert [r.method for r in read(bench.partial)] == ["full", "lora"]
    assert f"2 complete runs are in {bench.partial}: run again with --resume" in bench.said
    assert bench.run("--resume", "-k", "full or lora") == 0
    assert bench.ran() == ["full", "lora", "head"]  # those before the interruption alone
    assert list(bench.entries()) == ["full", "lora"]


def test_ctrl_c_leaves_no_worker(tmp_path):
    bench = Bench(tmp_path, ("full",), fake=False)
    with (tmp_path / "conftest.py").open("a") as conftest:
        conftest.write("import benchmarks.harness.worker as w\n_init = w.Worker.__init__\n")
        conftest.write("def init(self, *a):\n    _init(self, *a)\n")
        conftest.write(f"    open({str(tmp_path / 'ran.txt')!r}, 'a').write(f'{{self._process.pid}} head\\n')\n")
        conftest.write("w.Worker.__init__ = init\nw.Worker.round = lambda self: __import__('time').sleep(300)\n")
    assert interrupted(bench, signal.SIGINT) == 2
    pids = [int(word) for word in (tmp_path / "ran.txt").read_text().split() if word.isdigit()]
    assert pids
    for pid in pids:
        for _ in range(100):
            if not Path(f"/proc/{pid}").exists():
                break
            time.sleep(0.1)
        assert not Path(f"/proc/{pid}").exists()


def limit_files(size):
    """The system's refusal to let a file grow past `size` bytes stands in for a disk that is full."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_a_full_disk_is_one_clear_line_and_loses_nothing_complete(bench):
    assert bench.run("-k", "full or lora") == 0
    one_run = len(json.dumps(bench.entries()["full"]["extra_info"]))
    bench.out.unlink()
    bench.ran()
    # Room for a partial file of one run, not of two.
    assert bench.run(preexec_fn=limit_files(int(1.5 * one_run))) == 2, bench.said
    assert bench.ran() == ["full", "lora"]
    assert [r.method for r in read(bench.partial)] == ["full"]
    assert not bench.out.exists()
    assert bench.said.count("cannot be written") == 1
    assert "--resume" in bench.said
    assert "Traceback" not in bench.said
    assert bench.run("--resume") == 0
    assert bench.ran() == ["lora", "head"]
    assert list(bench.entries()) == ["full", "lora", "head"]


def test_an_older_json_survives_a_full_disk(bench):
    assert bench.run("-k", "full") == 0
    before = bench.out.read_bytes()
    # The partial file of the run is smaller than the JSON.
    assert bench.run("-k", "full", preexec_fn=limit_files(len(before) - 100)) == 3
    assert bench.out.read_bytes() == before
    assert bench.said.count(f"{bench.out} cannot be written") == 1
    assert [r.method for r in read(bench.partial)] == ["full"]
    assert "Traceback" not in bench.said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--benchmark-disable"], "--benchmark-disable leaves nothing to write"),
        (["--rounds", "0"], "must be positive"),
        (["--threads", "-1"], "must be positive"),
        (["--threads", "1025"], "--threads at most 1024"),
        (["--timing-span", "-1"], "must be from 0 to 86400 seconds"),
        (["--timing-span", "inf"], "must be from 0 to 86400 seconds"),
        (["--device", "cuda"], "needs an NVIDIA GPU"),
    ],
)
def test_what_would_end_without_results_is_refused_at_once(bench, options, message):
    assert bench.run(*options, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}) == pytest.ExitCode.USAGE_ERROR
    assert message in bench.said
    assert "Traceback" not in bench.said
    assert bench.ran() == []


def test_results_that_could_not_be_written_are_refused_at_once(bench):
    (bench.folder / "results").write_text("a file where a folder is needed")
    assert bench.run() == pytest.ExitCode.USAGE_ERROR
    assert "cannot be written" in bench.said
    assert bench.ran() == []


@pytest.mark.parametrize(
    "text", ["", '{"benchmarks": [', "[]", '{"benchmarks": [{"extra_info": {"schema_version": 1}}]}']
)
def test_what_cannot_be_resumed_is_said_and_left_alone(bench, text):
    bench.partial.parent.mkdir()
    bench.partial.write_text(text)
    assert bench.run("--resume") == pytest.ExitCode.USAGE_ERROR
    assert f"--resume: {bench.partial} is not a suite's results" in bench.said
    assert bench.partial.read_text() == text
    assert bench.ran() == []


def test_disabled_benchmarks_run_once_and_write_nothing(bench):
    command = [part for part in bench.command("--benchmark-disable") if "benchmark-json" not in part]
    assert subprocess.run(command, capture_output=True, cwd=ROOT, timeout=300).returncode == 0
    assert bench.ran() == ["full", "lora", "head"]
    assert not bench.out.parent.exists()


def test_a_large_case_runs_where_it_is_asked_for(bench):
    assert bench.run("-m", "large") == 0
    assert "1 passed, 3 deselected" in bench.said


# --- without a process


def suite(**options):
    return Suite(**{"rounds": 3, "threads": 2, "device": "cpu", "time_limit_s": 10, **options})


def kept(tmp_path, spec, **fields):
    """A journal that has been written and read again, with one run of `spec`."""
    journal = Journal(tmp_path / "out.json")
    record = spec.blank("layer 16x24", **{**expected_environment(spec), "timed_rounds": 3, **fields})
    journal.add("it", Entry(record, (1.0, 2.0, 3.0)))
    again = Journal(tmp_path / "out.json")
    again.resume()
    return again


def test_a_kept_run_is_found_again(tmp_path):
    spec = suite().spec("lora", layer="16x24", tokens=16, dtype="float32")
    for fields in ({}, {"transformers_version": version("transformers")}, {"status": "refused", "timed_rounds": None}):
        entry = kept(tmp_path, spec, **fields).find("it", spec)
        assert entry.seconds == (1.0, 2.0, 3.0)
        assert entry.record.budget == 7


@pytest.mark.parametrize(
    "fields",
    [
        {"commit": "another"},
        {"torch_version": "1.0"},
        {"transformers_version": "1.0"},
        {"device_name": "another"},
        {"threads": 3},
        {"driver": "580.65.06"},
        {"allocator": None},
        {"seed": 1},
        {"budget": 8},
        {"timed_rounds": 4},
        {"status": "crashed", "reason": "?"},
        {"status": "killed", "reason": "?"},
        {"status": "oom", "reason": "?"},
    ],
)
def test_a_run_of_other_circumstances_is_measured_anew(tmp_path, fields):
    spec = suite().spec("lora", layer="16x24", tokens=16, dtype="float32")
    assert kept(tmp_path, spec, **fields).find("it", spec) is None


def test_runs_that_the_json_does_not_hold_stay_in_the_partial_file(tmp_path):
    spec = suite().spec("lora", layer="16x24", tokens=16, dtype="float32")
    journal = kept(tmp_path, spec)
    journal.close(["another"])
    assert journal.path.exists()
    journal.close(["another", "it"])
    assert not journal.path.exists()


def test_every_case_of_the_matrix_has_a_run():
    methods = set()
    for kind in ("layer", "block"):
        for case in matrix.shapes(kind):
            size, tokens, dtype, method = case.values
            if size in matrix.LARGE:
                assert [mark.name for mark in case.marks] == ["large"]
                continue
            if (tokens, dtype) == (2048, "bfloat16"):
                spec = suite().spec(method, **{kind: size}, tokens=tokens, dtype=dtype)
                assert (spec.batch * spec.seq, spec.dtype, "x".join(map(str, getattr(spec, kind)))) == (
                    2048,
                    dtype,
                    size,
                )
                methods.add((method, spec.matched))
    assert methods == {(name, name not in ("full", "head")) for name in matrix.METHODS}
    for model in matrix.MODELS:
        assert suite().spec("lora", model=model, train_rest="all").model == model
    assert {case.values for case in matrix.models()} == set(product(matrix.MODELS, ("all", "none"), matrix.METHODS))
    case = suite(rounds=None).spec("lora", layer="384x1536", tokens=512, dtype="float32")
    assert (case.rounds, suite(rounds=None).spec("lora", model="minilm-l6", train_rest="all").rounds) == (45, 15)
    assert suite(rounds=7).spec("lora", layer="384x1536", tokens=512, dtype="float32").rounds == 7
    quick = [
        case for case in matrix.shapes("layer") + matrix.shapes("block") + matrix.models() if "quick" in str(case.marks)
    ]
    assert 15 <= len(quick) <= 25


def test_the_step_clock_stands_still_between_steps():
    clock = StepClock()
    assert clock.now() == clock.now() == 0.0
    clock.advance(0.5)
    assert clock.now() == 0.5


def test_the_summary_is_a_line_for_each_record():
    it = suite()
    it.records = [("a case", Record(method="lora", budget=7, model="m", peak_step_bytes=3 * 2**20)),
                  ("a case", Record(method="full", model="m", status="oom", reason="no"))]  # fmt: skip
    _, case, lora, full = it.summary()
    assert case == "a case"
    assert lora.split() == ["lora[7]", "3.00", "—", "—", "—", "ok"]
    assert full.split() == ["full", "—", "—", "—", "—", "oom"]
