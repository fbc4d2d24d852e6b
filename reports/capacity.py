"""Whether training that was predicted for CUDA fits on a card: what it needs, beside the sizes of cards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reports import tables
from reports.record import Record
from reports.tables import Cell, Column, Row, Table

# Of a card's memory, what the CUDA context and the loaded kernels are taken to need: not torch's, and not modelled. On
# a T4 141 MiB were measured, on an H100 650 to 840 (benchmarks/reference/); of cards between them nothing is at hand.
# benchmarks/harness/predict.py takes it from here, so that a prediction and its report count alike.
CONTEXT_BYTES = 512 * 2**20
# The memory of cards that are common; a size as it is sold, of which a driver may show somewhat less.
CARDS = tuple(size * tables.GIB for size in (16, 24, 40, 80))

FITS, TIGHT, TOO_SMALL = "fits", "tight", "does not fit"
# Best first: by this a column of words is sorted; a failure, which is none of them, comes last.
WORDS = (FITS, TIGHT, TOO_SMALL)


@dataclass(frozen=True)
class Need:
    """What a card must have for one training, bytes, each with the CUDA context.

    `step_bytes` is what is allocated at the peak of a step, `held_bytes` what the caching allocator holds in it, and
    `preparation_bytes` what is allocated at the peak of the preparation.
    """

    step_bytes: int
    held_bytes: int
    preparation_bytes: int

    @classmethod
    def of(cls, record: Record) -> Need | None:
        """The need of a record; None where it did not end ok, or one of the three was not obtained."""
        peaks = (record.peak_step_bytes, record.peak_reserved_bytes, record.peak_preparation_bytes)
        if record.status != "ok" or None in peaks:
            return None
        return cls(*(peak + CONTEXT_BYTES for peak in peaks))

    @property
    def least_bytes(self) -> int:
        """Without this it does not fit, however much of its cache the allocator gives back."""
        return max(self.step_bytes, self.preparation_bytes)

    @property
    def most_bytes(self) -> int:
        """With this it fits, and the allocator keeps its cache."""
        return max(self.held_bytes, self.least_bytes)

    @property
    def in_preparation(self) -> bool:
        """Whether more is allocated in the preparation than in a step."""
        return self.preparation_bytes > self.step_bytes


def asking(records: Iterable[Record]) -> list[Record]:
    """The records whose fit is a question: predictions for CUDA of a model. A lone layer is no training."""
    return [
        record
        for record in records
        if record.source == "predicted" and record.device_semantics == "cuda" and tables.alone(record.model) is None
    ]


def word(record: Record, card_bytes: int) -> str:
    """Whether the record's training fits on such a card; its status where that is not ok.

    A prediction that was made for this very size knows: it replayed the allocator at the limit.
    """
    if record.status != "ok":
        return record.status
    if record.gpu_memory_bytes == card_bytes and record.fits is not None:
        return FITS if record.fits else TOO_SMALL
    need = Need.of(record)
    if need is None:
        return tables.MISSING
    if need.most_bytes <= card_bytes:
        return FITS
    return TIGHT if need.least_bytes <= card_bytes else TOO_SMALL


def decides(record: Record) -> str:
    """The phase in which most is allocated: one of the step's, or the preparation."""
    need = Need.of(record)
    if need is None:
        return tables.MISSING
    return "preparation" if need.in_preparation else tables.plain(record.peak_phase)


def meant(records: Sequence[Record]) -> str:
    """Whose kernels the predictions mean, in a sentence."""
    # A refused one does not know its attention kernel.
    known = [record for record in records if record.status == "ok"] or records
    found = dict.fromkeys(f"{_card(record)} (attention: {_attention(record)})" for record in known)
    return f"Predicted for the kernels of {', of '.join(found)}."


def table(records: Sequence[Record]) -> Table:
    """What each record needs in GiB, how that comes about, and a word for each size of card."""
    differing = tables.naming_circumstances(records)
    described = (_METHOD, *(Column("differs", name.replace("_", " "), name, numeric=False) for name in differing))
    asked = any(record.fits is not None and record.gpu_memory_bytes not in CARDS for record in records)
    failed = any(record.status != "ok" for record in records)
    columns = (
        *described,
        _NEEDED,
        *(_card_column(card) for card in CARDS),
        *((_ASKED,) if asked else ()),
        _DECIDES,
        *_PARTS,
        *((_STATUS,) if failed else ()),
    )
    rows = []
    for record in records:
        need = Need.of(record)
        cells = [tables.text_cell(record, column) for column in described]
        cells.append(_size(None if need is None else need.most_bytes))
        cells += [_word_cell(record, card) for card in CARDS]
        cells += [_asked_cell(record)] if asked else []
        cells.append(_text(decides(record)))
        cells += [_size(getattr(record, column.field)) for column in _PARTS]
        cells += [tables.text_cell(record, _STATUS)] if failed else []
        rows.append(Row(record, tuple(cells)))
    return Table(columns, tuple(rows), ())


def card_name(card_bytes: int) -> str:
    """A card's memory in GiB on one line, without decimals that say nothing."""
    return tables.gib(card_bytes).removesuffix(".00") + "\u00a0GiB"


_METHOD = Column("run", "method", "method", numeric=False)
_NEEDED = Column(
    "a card must have",
    "needed, GiB",
    "peak_reserved_bytes",
    says="the larger of peak_reserved_bytes and peak_preparation_bytes, and the CUDA context",
)
_ASKED = Column("fits on a card of", "the size asked about", "fits", numeric=False)
_DECIDES = Column(
    "what decides", "phase", "peak_phase", numeric=False, says="the phase in which most bytes are allocated"
)
_PARTS = (
    Column("in a step, GiB", "allocated", "peak_step_bytes"),
    Column("in a step, GiB", "reserved", "peak_reserved_bytes"),
    Column("in the preparation, GiB", "allocated", "peak_preparation_bytes"),
)
_STATUS = Column("outcome", "status", "status", numeric=False)


def _card_column(card: int) -> Column:
    says = f"whether preparation and steps fit in {card_name(card)}: fits, tight, or does not fit"
    return Column("fits on a card of", card_name(card), "fits", numeric=False, says=says)


def _size(size_bytes: int | None) -> Cell:
    return Cell(tables.gib(size_bytes), None if size_bytes is None else str(size_bytes))


def _text(text: str) -> Cell:
    return Cell(text, None if text == tables.MISSING else text)


def _word_cell(record: Record, card: int) -> Cell:
    said = word(record, card)
    if said == tables.MISSING:
        return Cell(said, None)
    rank = WORDS.index(said) if said in WORDS else len(WORDS)
    runs_out = said == TOO_SMALL and record.gpu_memory_bytes == card and record.oom_phase is not None
    return Cell(f"{said} ({record.oom_phase})" if runs_out else said, str(rank))


def _asked_cell(record: Record) -> Cell:
    card = record.gpu_memory_bytes
    if card is None or record.fits is None:
        return Cell(tables.MISSING, None)
    cell = _word_cell(record, card)
    return Cell(f"{card_name(card)}: {cell.text}", cell.sort)


def _card(record: Record) -> str:
    if record.gpu is None:
        return "a card that is not named"
    by_capability = re.fullmatch(r"\d+\.\d", record.gpu)
    return f"a card of compute capability {record.gpu}" if by_capability else record.gpu


def _attention(record: Record) -> str:
    if record.attention is None:
        return "none"
    return record.attention if record.attention_kernel is None else f"{record.attention} by {record.attention_kernel}"
