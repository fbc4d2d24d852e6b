"""What holds, what fails, and what is not known: the rules by which the claim is judged.

"Identical" is an equivalence test, and it has two sides. A figure is a ratio to the rival's; it HOLDS at a tolerance t
where it lies in [1 - t, 1 + t], and FAILS where it lies outside, whichever side that is: what needs LESS memory is not
identical either, and `direction` says so. A prediction is one number; a figure that has an interval (low to high) holds
where all of it lies inside, fails where all of it lies outside, and is UNDECIDED where it spans a limit. A figure that
was not obtained is undecided.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"
VERDICTS = (HOLDS, FAILS, UNDECIDED)
# Of the ratio to 1: the one that decides, and two that are more lenient. The paper's own two figures that it calls
# identical, 944 and 1016 MB, are 7.6 % apart.
TOLERANCES = (0.02, 0.05, 0.08)
DECIDING_TOLERANCE = TOLERANCES[0]
NOT_OBTAINED = "not obtained"


@dataclass(frozen=True)
class Judgement:
    """The verdict on one ratio at one tolerance; `reason` is why there is no figure."""

    figure: float | None
    tolerance: float
    verdict: str
    direction: str | None  # equal, below or above; None where it is undecided
    reason: str | None = None

    @property
    def limits(self) -> tuple[float, float]:
        """Between which the ratio counts as 1."""
        return 1 - self.tolerance, 1 + self.tolerance


def judge(
    figure: float | None,
    tolerance: float,
    interval: tuple[float, float] | None = None,
    reason: str | None = None,
) -> Judgement:
    """The verdict on a ratio, by itself or with the interval that it is known in. Raises ValueError for no number."""
    if figure is None:
        return Judgement(None, tolerance, UNDECIDED, None, reason or NOT_OBTAINED)
    low, high = interval or (figure, figure)
    if not all(math.isfinite(value) for value in (low, figure, high)) or not low <= figure <= high:
        raise ValueError(f"a figure needs finite numbers with low <= figure <= high, got {low}, {figure}, {high}")
    least, most = 1 - tolerance, 1 + tolerance
    if least <= low and high <= most:
        return Judgement(figure, tolerance, HOLDS, "equal")
    if high < least:
        return Judgement(figure, tolerance, FAILS, "below")
    if low > most:
        return Judgement(figure, tolerance, FAILS, "above")
    return Judgement(figure, tolerance, UNDECIDED, None, "the interval spans a limit")


def combine(verdicts: Iterable[str]) -> str:
    """The verdict on several cases together: it fails where one fails, and holds where all hold; none is undecided."""
    found = set(verdicts)
    if FAILS in found:
        return FAILS
    return HOLDS if found == {HOLDS} else UNDECIDED
