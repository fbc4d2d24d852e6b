"""Which figures are tracked, which way each gets worse, and by how much it may move before that is said.

How much is data: `thresholds.json` beside this file has one entry for each figure, and a file of a user's own replaces
entries of it. Its rules:

 - ``exact``: any move counts;
 - ``tolerance``: a move counts beyond the larger of `relative` (a share of the old figure) and `absolute` (in the
   figure's own unit);
 - ``interval``: of a ratio of times: a move counts where the two intervals do not meet, and beyond `relative`;
 - ``ignore``: the figure is not compared.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from reports.reading import parse, read_text, shown
from reports.record import BREAKDOWN

DEFAULTS = Path(__file__).with_name("thresholds.json")
# Each rule with the bounds that it takes.
RULES = {"exact": (), "tolerance": ("relative", "absolute"), "interval": ("relative",), "ignore": ()}
# The figures that carry an interval.
WITH_INTERVAL = ("step_time_ratio",)

# A figure is worse where it is larger, unless it is one of these.
WORSE_WHERE_SMALLER = ("fits",)
# As the method is defined, no move of these is for the better: fewer trained entries are another method.
NEVER_BETTER = (
    "total_params",
    "trainable_params",
    "updated_params",
    "touched_params",
    "budget_params",
    "padding_fraction",
    "loss_first",
    "loss_last",
)
# What a peak consists of: where the peak falls, a part of it may well be larger at the instant of the new one.
PARTS = {name: "peak_step_bytes" for name in BREAKDOWN}
# What hangs on the machine; all others follow from the versions of torch and transformers where the CPU's memory is
# meant, or a prediction is.
OF_THE_MACHINE = (
    "touched_params",
    "process_peak_bytes",
    "kernel_workspace_bytes",
    "preparation_workspace_bytes",
    "nvml_process_bytes",
    "alloc_retries",
    "alloc_ooms",
    "step_time_ratio",
    "step_time_s",
    "step_time_min_s",
    "step_time_max_s",
    "reference_step_time_s",
    "preparation_time_s",
    "loss_first",
    "loss_last",
)


class ThresholdsError(ValueError):
    """A file of thresholds that cannot be read, or that says what has no meaning; the message says what to do."""


@dataclass(frozen=True)
class Threshold:
    """How far one figure may move: one of `RULES`, its bounds, and why it is this one."""

    rule: str
    relative: float = 0.0  # a share of the old figure: 0.1 is 10 %
    absolute: float = 0.0  # in the figure's unit
    reason: str | None = None

    def allows(self, old: float, new: float) -> bool:
        """Whether the move from `old` to `new` is within the bounds."""
        before, after, relative, absolute = map(_as_written, (old, new, self.relative, self.absolute))
        return abs(after - before) <= max(relative * abs(before), absolute)


def _as_written(value: float) -> Fraction:
    """The decimal number: from 1.0 to 1.1 is a tenth, which binary fractions near them do not say."""
    return Fraction(str(value) if isinstance(value, float) else value)


def read_thresholds(path: str | os.PathLike | None = None) -> dict[str, Threshold]:
    """The threshold of every tracked figure: the packaged ones, and over them those of the file at `path`.

    Raises `ThresholdsError`.
    """
    packaged = _read(DEFAULTS)
    return packaged if path is None else packaged | _read(path, known=packaged)


def _read(path: str | os.PathLike, known: Mapping[str, Threshold] | None = None) -> dict[str, Threshold]:
    source = os.fspath(path)
    try:
        raw = parse(read_text(path))
    except (OSError, ValueError) as error:
        raise ThresholdsError(f"cannot read the thresholds {source}: {error}") from error
    if not isinstance(raw, dict):
        raise ThresholdsError(f"{source} must hold a JSON object, figure by figure, got {type(raw).__name__}")
    for name in raw:
        if known is not None and name not in known:
            raise ThresholdsError(f"{source}: unknown figure {shown(name)}; tracked are {', '.join(known)}")
    return {name: _threshold(entry, name, source) for name, entry in raw.items()}


def _threshold(entry: object, name: str, source: str) -> Threshold:
    where = f"{source}, {name}"
    if not isinstance(entry, dict):
        raise ThresholdsError(f'{where}: give an object such as {{"rule": "exact"}}, got {shown(entry)}')
    rule = entry.get("rule")
    if not isinstance(rule, str) or rule not in RULES:
        raise ThresholdsError(f"{where}: rule must be one of {', '.join(RULES)}, got {shown(rule)}")
    if rule == "interval" and name not in WITH_INTERVAL:
        raise ThresholdsError(
            f"{where}: it has no interval; use tolerance, or interval with {', '.join(WITH_INTERVAL)}"
        )
    bounds = RULES[rule]
    if unknown := sorted(set(entry) - {"rule", "reason", *bounds}):
        takes = f"takes {' and '.join(bounds)}" if bounds else "takes no bound"
        raise ThresholdsError(f"{where}: {shown(unknown[0])} has no meaning here, {rule} {takes}")
    if not isinstance(entry.get("reason"), str | None):
        raise ThresholdsError(f"{where}: reason must be text, got {shown(entry['reason'])}")
    if rule == "tolerance" and not set(bounds) & set(entry):
        raise ThresholdsError(f"{where}: tolerance needs relative, absolute or both")
    for bound in set(bounds) & set(entry):
        value = entry[bound]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ThresholdsError(f"{where}: {bound} must be a number, 0 or more, got {shown(value)}")
        if bound == "relative" and value > 1:
            raise ThresholdsError(f"{where}: relative is a share from 0 to 1, and 0.1 is 10 %, got {shown(value)}")
    return Threshold(**entry)
