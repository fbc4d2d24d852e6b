"""A study's results on disk, a line of JSON for each run as it ends: killed at any moment, it loses that run alone."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.errors import InputError
from benchmarks.quality.study import Study
from benchmarks.quality.tasks import PROTOCOL
from benchmarks.quality.training import FINAL, Outcome, Trial
from reports.reading import MOST_BYTES, open_file, parse, shown
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
        complete = 0  # bytes
        with open_file(self.path) as file:
            for number in itertools.count(1):
                line = file.readline(MOST_BYTES + 1)
                if not line.endswith(b"\n") and len(line) <= MOST_BYTES:
                    break
                try:
                    self._take(line, number)
                except (ValueError, TypeError, KeyError, AttributeError, RecordError) as error:
                    raise InputError(f"{self.path}, line {number}, is not of a study's runs: {error}") from error
                complete += len(line)
        if line:
            # It was cut off: what is appended must not join it.
            with open(self.path, "r+b") as file:
                file.truncate(complete)

    def _take(self, line: bytes, number: int) -> None:
        if len(line) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES // 2**20} MiB")
        raw = parse(line.decode("utf-8"))
        if number == 1:
            self.heading = _heading(raw)
        else:
            outcome = Outcome.from_dict(raw)
            if outcome.status == "ok" and not (outcome.losses and (outcome.curve or outcome.trial.purpose != FINAL)):
                raise ValueError("a run that ended ok has losses, and a final one a curve")
            self._outcomes[outcome.trial] = outcome


def _heading(raw: dict[str, object]) -> Heading:
    if (raw["schema"], raw["protocol"]) != (SCHEMA, PROTOCOL):
        raise ValueError(
            f"schema {shown(raw['schema'])} and protocol {shown(raw['protocol'])}, where this version reads {SCHEMA} "
            f"and {PROTOCOL}; choose another directory"
        )
    arms = {name: Record.from_dict(record) for name, record in raw["arms"].items()}
    study = Study.from_dict(raw["study"])
    if set(arms) != set(study.arms):
        raise ValueError(f"predictions of {', '.join(arms) or 'no arm'}, where the study has {', '.join(study.arms)}")
    return Heading(study, arms)
