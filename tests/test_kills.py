"""A sweep that is killed at random moments and goes on gives what one that is left alone gives; nothing runs on.

Three kills for each sweep; `KILLS=10 pytest tests/test_kills.py` makes it ten.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.lock import held
from tests.test_suite import ROOT, Bench

KILLS = int(os.environ.get("KILLS", "3"))
METHODS = ("full", "head", "lora", "meprop-example", "meprop-weight", "random-mask", "sparsegrad", "sparsegrad-core")


class Server:
    """The parent's end of tests/killable.py."""

    def __init__(self):
        # The suites are of their own, whoever runs this test.
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.killable"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=variables | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )

    def start(self, command, argv, log):
        """Begin a command; the id of its process."""
        self._process.stdin.write(json.dumps({"command": command, "argv": argv, "log": str(log)}) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def end(self):
        """Wait for the command's end: its exit code, negative for a signal."""
        return os.waitstatus_to_exitcode(int(self._process.stdout.readline()))

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture(scope="module")
def server():
    it = Server()
    yield it
    it.close()


class Study:
    """A small quality study, whose ledger grows by the line."""

    def __init__(self, folder):
        self.folder = folder
        self.grows = folder / "study" / "runs.jsonl"
        self.log = folder / "log"

    def start(self, server, resume):
        options = "--arms lora,sparsegrad-core@peak,head --tasks trec,amazon --seeds 2 --jobs 2 --json".split()
        argv = ["quality", "--out", str(self.folder / "study"), *options, str(self.folder / "summary.json")]
        return server.start("quality", argv, self.log)

    def results(self):
        """All that does not depend on who ran what when."""
        lines = [json.loads(line) for line in self.grows.read_text().splitlines()]
        return lines[0], sorted(json.dumps(line) for line in lines[1:]), json.loads(self.summary.read_text())

    @property
    def summary(self):
        return self.folder / "study" / "summary.json"

    def processes(self):
        return [int(line) for line in self.log.read_text().split()]


class Suite:
    """A small suite, which notes each method that has run."""

    def __init__(self, folder):
        self.bench = Bench(folder, METHODS, script={method: {"sleep": 0.03} for method in METHODS})
        self.grows = folder / "ran.txt"
        self.log = folder / "log"

    def start(self, server, resume):
        argv = self.bench.command(*["--resume"] * resume)[3:]
        return server.start("suite", argv, self.log)

    def results(self):
        assert not self.bench.partial.exists()
        return {m: (e["stats"], {**e["extra_info"], "created_at": None}) for m, e in self.bench.entries().items()}

    def processes(self):
        return []  # its runs are made up


def size(path):
    return path.stat().st_size if path.exists() else 0


def end(sweep, server, growth, pause_s=0.0, how=signal.SIGKILL):
    """Go on with the sweep and end it when its file has grown by so much, after a pause; its exit code."""
    moment = size(sweep.grows) + growth
    pid = sweep.start(server, resume=True)
    deadline = time.monotonic() + 60
    while size(sweep.grows) < moment and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(pause_s)
    os.kill(pid, how)
    return server.end()


def gone(pid):
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("kind", [Study, Suite])
def test_killed_at_random_moments_it_ends_as_if_left_alone(kind, server, tmp_path_factory):
    alone = kind(tmp_path_factory.mktemp("alone"))
    alone.start(server, resume=False)
    assert server.end() == 0
    whole = size(alone.grows)
    assert not (alone.grows.with_name(f".{alone.grows.name}.lock")).exists()

    killed = kind(tmp_path_factory.mktemp("killed"))
    moments = [(random.uniform(0, 0.9 * whole / KILLS), random.uniform(0, 0.01)) for _ in range(KILLS)]
    for moment in moments:
        assert end(killed, server, *moment) == -signal.SIGKILL
    killed.start(server, resume=True)
    assert server.end() == 0
    assert killed.results() == alone.results(), moments
    assert all(map(gone, killed.processes()))


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_study_that_is_told_to_end_leaves_a_complete_file_and_no_process(how, code, server, tmp_path):
    study = Study(tmp_path)
    assert end(study, server, growth=15_000, how=how) == code
    assert study.grows.read_bytes().endswith(b"}\n")
    assert len(study.grows.read_text().splitlines()) > 5
    assert [entry.name for entry in study.grows.parent.iterdir()] == [study.grows.name]
    assert len(study.processes()) == 2
    assert all(map(gone, study.processes()))
    said = Path(f"{study.log}.out").read_text()
    assert "Traceback" not in said
    if how == signal.SIGINT:
        assert said.splitlines()[-1] == "sparsegrad-bench: interrupted; the records that were complete are kept"


def test_two_suites_on_one_file(server, tmp_path):
    sweep = Suite(tmp_path)
    with held(sweep.bench.partial, "--benchmark-json"):
        sweep.start(server, resume=False)
        assert server.end() == pytest.ExitCode.USAGE_ERROR
    said = Path(f"{sweep.log}.out").read_text()
    assert f"{sweep.bench.partial} is being written by process {os.getpid()}" in said
    assert "choose another --benchmark-json" in said
    assert not sweep.grows.exists()
