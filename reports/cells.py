"""What the tables of the claim's page are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Kinds of cells: verdicts, and what needs less memory, or fits more, than LoRA.
JUDGED = ("holds", "fails", "undecided", "better")


@dataclass(frozen=True)
class Cell:
    """A cell: text, a second and a third line under it, and what it is: number, missing, and any of `JUDGED`."""

    text: str
    small: str = ""
    kind: str = ""
    note: str = ""

    @property
    def judged(self) -> bool:
        """Whether the cell is a verdict, or a number with a verdict on it."""
        return any(word in JUDGED for word in self.kind.split())


@dataclass(frozen=True)
class Table:
    """A table with a caption; the first cell of each row is its heading, with the method's colour where it has one."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[tuple[str | None, Sequence[Cell]]]  # method, cells
