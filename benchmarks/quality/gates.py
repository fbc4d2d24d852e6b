"""Is the training loop right? Full fine-tuning and the head alone on all the data, against what they must reach.

With every training example the encoder must reach what is known to be within its reach, and a head on the frozen
encoder must stay far below it: otherwise a study with this loop would compare methods that do not learn, or tasks with
nothing to learn. `python -m benchmarks.quality.gates` takes about a quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.collect import check_destination, say
from benchmarks.quality.study import Study
from benchmarks.quality.tasks import load_task
from benchmarks.quality.training import FINAL, Trial, run
from reports.record import write_bytes

EPOCHS = 3
HEAD_LR = 1e-2


@dataclass(frozen=True)
class Gate:
    """What full fine-tuning must reach on a task, and how far below it the head alone must stay, in points.

    `lr` is full fine-tuning's: on movie-sentiment the best on validation of 5e-5, 1e-4 and 2e-4.
    """

    task: str
    least: float
    lr: float = 2e-4
    head_below: float = 10.0

    def passed(self, full: float, head: float) -> bool:
        """Whether scores are on the right side of both."""
        return full >= self.least and head <= full - self.head_below


GATES = (Gate("trec", 91.0), Gate("movie-sentiment", 84.0, lr=5e-5))


def trial(task: str, method: str, epochs: int = EPOCHS) -> Trial:
    """A final run on the whole pool, with the core study's other settings."""
    study = Study(train_size=None, epochs=epochs)
    return Trial(
        purpose=FINAL,
        task=task,
        train_size=None,
        arm=method,
        method=method,
        budget=None,
        lr=next(gate.lr for gate in GATES if gate.task == task) if method == "full" else HEAD_LR,
        seed=0,
        steps=study.steps(len(load_task(task).data.train)),
        model=study.model,
        batch=study.batch,
        longest=study.longest,
        train_rest=study.train_rest,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both methods on each task; 1 where a gate is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.gates", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", metavar="PATH|-", default="-", help="the runs without predictions (default: -)")
    destination = parser.parse_args(arguments).json
    check_destination(destination)
    runs, missed = [], 0
    for gate in GATES:
        full, head = (run(trial(gate.task, method)) for method in ("full", "head"))
        passed = gate.passed(full.score, head.score)
        missed += not passed
        runs += [full, head]
        say(
            f"{gate.task}: full {full.score:.1f} (at least {gate.least:g}), head {head.score:.1f} "
            f"(at most {full.score - gate.head_below:.1f}): {'reached' if passed else 'MISSED'}"
        )
    text = json.dumps([asdict(each) | {"predictions": None} for each in runs], indent=1) + "\n"
    if destination == "-":
        print(text, end="")
    else:
        write_bytes(text.encode(), destination)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
