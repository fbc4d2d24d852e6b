"""Runs commands in processes that can be killed: a process imports everything once and forks for each command.

It reads lines of JSON, `{"command": "quality" | "suite", "argv": [...], "log": path}`, and answers each with the
process's id at once and with its exit status when it has ended. What takes long is made up: the study's runs come from
small programs whose answers follow from the question, in processes of their own as the real ones do.
"""

import json
import os
import signal
import sys

import pytest

from benchmarks import cli
from benchmarks.harness import process
from benchmarks.harness.text import Example, TextData
from benchmarks.quality import command, schedule, summary
from benchmarks.quality.study import ARMS
from benchmarks.quality.tasks import Task
from reports.record import Record

# Notes its process's id; a run's outcome follows from the trial alone.
RUNS = """
import json, os, sys, time, zlib
with open({log!r}, "a") as log:
    log.write(f"{{os.getpid()}}\\n")
for line in sys.stdin:
    trial, number = json.loads(line), zlib.crc32(line.encode())
    time.sleep(0.004)
    found = [float(number >> i & 1) for i in range(30)]
    final = {{"predictions": found, "curve": [[1, 5.0], [2, number % 89]]}} if trial["purpose"] == "final" else {{}}
    outcome = {{"trial": trial, "status": "ok", "score": number % 97, "losses": [2.0, number % 7], **final}}
    print(json.dumps(outcome), flush=True)
"""
EXAMPLES = tuple(Example(f"text {i}", i % 2) for i in range(30))


def task(name, hub):
    return Task(TextData(name, train=EXAMPLES, validation=(), test=EXAMPLES, label_names=("a", "b"), source=""))


def predicted(study, say):
    return {arm: Record(method=ARMS[arm].method, model="m", peak_step_bytes=2**20) for arm in study.arms}


def quality(argv, log):
    process.process_command = lambda module: [sys.executable, "-S", "-c", RUNS.format(log=log)]
    schedule.load_task = summary.load_task = task
    command._check_workloads = lambda study: None
    command.records = predicted
    return cli.main(argv)


def suite(argv, log):
    return pytest.main(argv)


def main():
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(os.open(f"{asked['log']}.out", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 1)
            os.dup2(1, 2)
            # A shell starts what runs in its background with Ctrl-C ignored, and children inherit that.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = 70
            try:
                code = {"quality": quality, "suite": suite}[asked["command"]](asked["argv"], asked["log"])
            except SystemExit as end:
                code = end.code
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
