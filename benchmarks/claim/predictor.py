"""Predictions, each made once, in as many processes as are given, with a line on stderr as they come."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import replace
from importlib.metadata import version
from itertools import count
from multiprocessing.connection import wait
from pathlib import Path
from typing import TypeVar

from benchmarks.collect import outcome, say
from benchmarks.harness.environment import environment
from benchmarks.harness.predict import predict
from benchmarks.harness.spec import RunSpec
from reports.record import Record, read

Found = TypeVar("Found")

# What says why a budget was chosen, and changes nothing of what is predicted.
_REASONS = ("matched", "equal_trainable", "equal_memory")
# What a spec asks for, of the fields of a record. Its data is the workload's own, which only the record names.
_ASKED = tuple(sorted(set(RunSpec("full").configuration()) - {*_REASONS, "data"}))
# Which of the parts of `each` asks.
_PART: ContextVar[int | None] = ContextVar("part", default=None)


class Predictor:
    """The record of a spec; a spec that was predicted before is not predicted again.

    A context manager, which ends the processes.

    Args:
        run: what predicts; records lose their timelines, which nothing here reads.
        jobs: predictions at a time. With 1 they are made in this process; else in others, where `run` must be a
            function of a module.
        known: records that need not be made again, such as `made_before` finds.
    """

    def __init__(self, run: Callable[[RunSpec], Record] = predict, jobs: int = 1, known: Iterable[Record] = ()):
        self._run, self._jobs = run, jobs
        self._pool: ProcessPoolExecutor | None = None
        if jobs > 1:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_end_with_parent)
        self._known = {_identity(record): record for record in known}
        self._found: dict[RunSpec, Future[Record]] = {}
        self._places: dict[RunSpec, tuple[int, int]] = {}
        self._turn, self._asked, self._said = threading.Lock(), count(), count(1)
        self._started = time.monotonic()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            # Those at work would finish what they have, and what is queued for them, before they heard of it.
            for process in multiprocessing.active_children():
                process.terminate()

    @property
    def records(self) -> list[Record]:
        """All that were predicted, in the order in which one process alone would have made them."""
        done = [spec for spec, found in self._found.items() if found.done() and not found.cancelled()]
        return [self._found[spec].result() for spec in sorted(done, key=self._places.get) if not self._failed(spec)]

    @property
    def unasked(self) -> list[Record]:
        """The known records that nothing asked for so far."""
        return list(self._known.values())

    def each(self, parts: Iterable[Callable[[], Found]]) -> list[Found]:
        """What the parts give, in their order. With several jobs all wait for their predictions side by side.

        What they do besides, they do one at a time: it need not be safe for threads (lazy imports are not). An error
        of a part is raised; the parts that have begun by then end first.
        """
        several = list(parts)
        if self._jobs == 1:
            return [part() for part in several]
        # As many threads as parts: a part that waits for its prediction takes no processor.
        with ThreadPoolExecutor(max(1, len(several))) as threads:
            begun = [threads.submit(self._placed, number, part) for number, part in enumerate(several)]
            try:
                return [each.result() for each in begun]
            except BaseException:
                self.__exit__()
                raise

    def __call__(self, spec: RunSpec) -> Record:
        """The record of `spec`."""
        key = replace(spec, **dict.fromkeys(_REASONS))
        if key not in self._found and key.data is None:
            self._take_up(key)
        asked = key in self._found
        if not asked:
            self._found[key] = Future() if self._pool is None else self._pool.submit(_made, self._run, key)
        place = (_PART.get() or 0, next(self._asked))
        self._places[key] = min(place, self._places.get(key, place))
        found = self._found[key]
        if self._pool is None and not asked:
            try:
                found.set_result(_made(self._run, key))
            except BaseException:
                del self._found[key]
                raise
        record = self._waited(found)
        if not asked:
            self._say(key, record)
        return replace(record, **{name: getattr(spec, name) for name in _REASONS})

    def _take_up(self, spec: RunSpec) -> None:
        """Found, if it is known."""
        if record := self._known.pop(_identity(spec.blank(spec.label())), None):
            self._found[spec] = Future()
            self._found[spec].set_result(record)

    def _placed(self, number: int, part: Callable[[], Found]) -> Found:
        _PART.set(number)  # a thread of the pool may serve several parts, one after the other
        with self._turn:
            return part()

    def _waited(self, found: Future[Record]) -> Record:
        """The result; a part's turn is another's while it is not there."""
        if _PART.get() is None:
            return found.result()
        self._turn.release()
        try:
            return found.result()
        finally:
            self._turn.acquire()

    def _failed(self, spec: RunSpec) -> bool:
        return self._found[spec].exception() is not None

    def _say(self, spec: RunSpec, record: Record) -> None:
        passed = time.monotonic() - self._started
        facts = f"{spec.label()}, {spec.batch} x {spec.seq}, {spec.dtype}, {spec.device}, {record.label}"
        say(f"[{next(self._said)}] {facts}: {outcome(record)} (after {passed:.0f} s)")


def made_before(path: Path) -> list[Record]:
    """The predictions of a file that this very code would make again, by its commit and versions; none without a file.

    Raises `RecordError` for a file that holds no records.
    """
    facts = environment("cpu") | {"transformers_version": version("transformers")}
    if not path.exists() or facts["commit"] is None or str(facts["commit"]).endswith("-dirty"):
        return []
    same = {name: facts[name] for name in ("commit", "python_version", "torch_version", "transformers_version")}
    return [
        record
        for record in read(path)
        if record.status == "ok" and same == {name: getattr(record, name) for name in same}
    ]


def _identity(record: Record) -> tuple[object, ...]:
    """What was asked for, and of which workload."""
    return (record.model, *(getattr(record, name) for name in _ASKED))


def _made(run: Callable[[RunSpec], Record], spec: RunSpec) -> Record:
    return replace(run(spec), timeline=None)


def _end_with_parent() -> None:
    """A pool's process does not learn that its parent was killed: it would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's, which ends the pool
    parent = multiprocessing.parent_process()

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
