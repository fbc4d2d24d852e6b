"""A study's results on disk, a line of JSON for each run as it ends: killed at any moment, it loses that run alone."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.errors import InputError
from benchmarks.quality.study import Study
from benchmarks.quality.tasks import PROTOCOL
from benchmarks.quality.training import Outcome, Trial
from reports.record import Record, RecordError

SCHEMA = 1
# A run that ended so would end so again; the others may have met a machine in trouble and are tried again.
SETTLED = ("ok", "diverged", "refused")


@dataclass(frozen=True)
class Heading:
    """The first line: the study, and each arm's prediction with the budget that it got."""

    study: Study
    arms: dict[str, Record]


class Ledger:
    """The file `runs.jsonl` of a study's directory."""

    def __init__(self, path: Path):
        self.path = path
        self.heading: Heading | None = None
        self._outcomes: dict[Trial, Outcome] = {}
        if path.exists():
            self._read()

    @property
    def outcomes(self) -> Sequence[Outcome]:
        """The last outcome of each trial."""
        return list(self._outcomes.values())

    def settled(self, trial: Trial) -> bool:
        """Whether the trial needs no run any more."""
        return trial in self._outcomes and self._outcomes[trial].status in SETTLED

    def start(self, heading: Heading) -> None:
        """Write the first line of a new ledger."""
        self.heading = heading
        arms = {name: record.to_dict() for name, record in heading.arms.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._append({"schema": SCHEMA, "protocol": PROTOCOL, "study": heading.study.to_dict(), "arms": arms})

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome, in memory and on disk."""
        self._append(outcome.to_dict())
        self._outcomes[outcome.trial] = outcome

    def _append(self, line: dict[str, object]) -> None:
        with open(self.path, "ab") as file:
            file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        content = self.path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        lines = complete.splitlines()
        for number, line in enumerate(lines, 1):
            try:
                raw = json.loads(line, parse_constant=_no_number)
                if number == 1:
                    self.heading = _heading(raw)
                else:
                    outcome = Outcome.from_dict(raw)
                    self._outcomes[outcome.trial] = outcome
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError, RecordError) as error:
                raise InputError(f"{self.path}, line {number}, is not of a study's runs: {error}") from error
        if len(complete) < len(content):
            # A line that was cut off: what is appended must not join it.
            with open(self.path, "r+b") as file:
                file.truncate(len(complete))


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _heading(raw: dict[str, object]) -> Heading:
    if (raw["schema"], raw["protocol"]) != (SCHEMA, PROTOCOL):
        raise ValueError(
            f"schema {raw['schema']} and protocol {raw['protocol']}, where this version reads {SCHEMA} and {PROTOCOL}; "
            "choose another directory"
        )
    arms = {name: Record.from_dict(record) for name, record in raw["arms"].items()}
    return Heading(Study.from_dict(raw["study"]), arms)
