"""The command `quality`: run what a study lacks, and say what it has found."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from benchmarks.collect import check_destination, say
from benchmarks.harness import models
from benchmarks.harness.errors import InputError
from benchmarks.lock import held
from benchmarks.quality.cluster import Cluster, ClusterWorker
from benchmarks.quality.ledger import Heading, Ledger
from benchmarks.quality.schedule import run_all
from benchmarks.quality.study import ARMS, CORE, Study, records
from benchmarks.quality.summary import summarise, table
from benchmarks.quality.tasks import TaskWorkload, load_task
from benchmarks.quality.worker import TrialWorker
from reports.reading import shown
from reports.record import write_bytes

MOST_JOBS = 1024
RUNS, SUMMARY = "runs.jsonl", "summary.json"
ARM_SETS = {"core": tuple(arm.name for arm in CORE), "extended": tuple(ARMS)}


def quality_command(arguments: argparse.Namespace) -> None:
    """Start or continue the study in `--out`, for as long as `--minutes` says, and write its summary."""
    check_destination(arguments.json)
    if not 1 <= arguments.jobs <= MOST_JOBS:
        raise InputError(f"--jobs must be from 1 to {MOST_JOBS}, got {shown(arguments.jobs)}")
    for option in ("minutes", "time_limit"):
        value = getattr(arguments, option)
        if value is not None and not value > 0:
            raise InputError(f"--{option.replace('_', '-')} must be positive, got {value}")
    if arguments.cluster_option and arguments.cluster is None:
        raise InputError("--cluster-option goes with --cluster: say which")
    asked = study_of(arguments)
    path = arguments.out / RUNS
    if not path.exists():
        # Before the directory is made: a study that cannot be leaves nothing.
        _check_workloads(asked)
    worker = TrialWorker
    if arguments.cluster is not None:
        worker = Cluster(arguments.cluster, arguments.out / "cluster", dict(arguments.cluster_option))
    with held(path, "--out"):
        _go_on(asked, path, arguments, worker)


def _go_on(
    asked: Study, path: Path, arguments: argparse.Namespace, worker: Callable[[float], TrialWorker | ClusterWorker]
) -> None:
    ledger = Ledger(path)
    if ledger.heading is None:
        say("budgets by prediction ...")
        ledger.start(Heading(asked, records(asked, say)))
    elif ledger.heading.study != asked:
        raise InputError(f"{ledger.path} is of another study ({_differences(ledger.heading.study, asked)}): {_CHOOSE}")
    seconds = None if arguments.minutes is None else arguments.minutes * 60
    complete = run_all(ledger, arguments.jobs, say, arguments.time_limit, seconds, worker)
    summary = summarise(ledger)
    text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    write_bytes(text.encode(), arguments.out / SUMMARY)
    if arguments.json == "-":
        sys.stdout.write(text)
    else:
        write_bytes(text.encode(), arguments.json)
    say("\n".join(table(summary)))
    if not complete:
        say(f"not complete: the same command goes on; {arguments.out / SUMMARY} says what is known")


def _check_workloads(study: Study) -> None:
    """Every task's workload, before hours of training: a study is not begun with an error in it.

    Raises:
        InputError: as `TaskWorkload` and `Task.training_set`.
    """
    source = models.resolve(study.model, hub=study.hub)
    for name in study.tasks:
        task = load_task(name, study.hub)
        TaskWorkload(
            task,
            task.training_set(study.train_size, 0),
            source,
            batch=study.batch,
            seq=study.longest,
            dtype="float32",
            device="cpu",
            seed=0,
            targets="mlp",
        )


_CHOOSE = "give its settings, or another --out"


def study_of(arguments: argparse.Namespace) -> Study:
    """The study that a command line asks for. Raises `InputError`."""
    given = {f.name: getattr(arguments, f.name) for f in fields(Study) if hasattr(arguments, f.name)}
    if arguments.tasks is None:
        del given["tasks"]
    arms = ARM_SETS.get(arguments.arms) or tuple(part.strip() for part in arguments.arms.split(","))
    return Study(**given | {"arms": arms})


def _differences(before: Study, asked: Study) -> str:
    differing = [f.name for f in fields(Study) if getattr(before, f.name) != getattr(asked, f.name)]
    return ", ".join(f"{name} {getattr(before, name)} there, {getattr(asked, name)} here" for name in differing)
