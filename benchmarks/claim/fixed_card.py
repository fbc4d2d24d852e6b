"""Reading 3: a card of a given size. The largest batch, sequence and model that each method still fits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from benchmarks.claim.cases import FORMS, LADDER, ON_LADDER, PUBLISHED, Case
from benchmarks.claim.equal_parameters import verdict_row
from benchmarks.claim.predictor import Predictor
from benchmarks.claim.verdict import TOLERANCES, judge
from benchmarks.harness.fit import MOST
from benchmarks.harness.plan import plan
from benchmarks.harness.spec import RunSpec
from reports.capacity import FITS, TIGHT, TOO_SMALL, Need, card_name, word
from reports.record import Record

AXES = ("batch", "seq", "model")
# A search ends where the number that fits and the next that does not are as near: every number below 200 is exact.
RESOLUTION = 1 / 200
# Where even so few do not fit, none does. Of a token or two a prediction does not know which rows of dL/dY are zero.
LEAST = {"batch": 1, "seq": 8}
# A search goes on to at most so many times the largest number that is known: peaks that hardly rise, because they lie
# in the optimizer's step, say nothing of how far it is to one that does not fit.
FURTHEST = 8


@dataclass(frozen=True)
class Largest:
    """The largest batch or sequence (`number`), or model (`name`, and its parameters) of a method on a card.

    `number` was seen to fit, and what is above `most` not to. `number` is 0 where `LEAST` does not fit, and None where
    it was not obtained (`reason`); `longest`: the search ended at the model's longest sequence, so that the card may
    hold more.
    """

    case: str
    axis: str
    card_bytes: int
    record: Record  # of the largest, or of what was tried last
    number: int | None
    most: int | None = None
    name: str | None = None
    longest: bool = False
    reason: str | None = None


def find(case: Case, methods: Sequence[str], axis: str, cards: Sequence[int], predictor: Predictor) -> list[Largest]:
    """The largest batch or seq of each method on each card, budgets being matched to LoRA's."""
    common = case.common()
    if axis == "seq":
        common["batch"] = case.seq_batch
    named = ",".join(case.reference if name == "lora" else name for name in methods)
    found = []
    for spec in plan(named, case.reference, **common):
        search = Search(spec, axis, predictor)
        found += [search.largest(case.name, card) for card in cards]
    return found


def find_model(methods: Sequence[str], cards: Sequence[int], predictor: Predictor) -> list[Largest]:
    """The largest decoder of `LADDER` that each method trains on each card."""
    named = ",".join(ON_LADDER.reference if name == "lora" else name for name in methods)
    records: dict[str, list[tuple[str, RunSpec, Record]]] = {}
    for model in LADDER:
        for spec in plan(named, ON_LADDER.reference, model=model, **ON_LADDER.common()):
            records.setdefault(spec.method, []).append((model, spec, predictor(spec)))
    tried = [each for of_method in records.values() for each in of_method if each[2].status == "ok"]
    # What a method adds does not make a model larger.
    size = {model: min(r.total_params for name, _, r in tried if name == model) for model, _, _ in tried}
    found = []
    for of_method in records.values():
        failed = [
            f"{model}: {record.status}, {record.reason}" for model, _, record in of_method if record.status != "ok"
        ]
        for card in cards:
            best, number, name = of_method[0][2], 0, None
            for model, spec, record in of_method:
                if record.status == "ok" and fits(spec, record, card, predictor) and size[model] > number:
                    best, number, name = record, size[model], model
            if failed:
                number, name = None, None
            found.append(
                Largest(ON_LADDER.name, "model", card, best, number, number, name, reason="; ".join(failed) or None)
            )
    return found


def fits(spec: RunSpec, record: Record, card: int, predictor: Predictor) -> bool:
    """Whether preparation and training fit on the card. Only where it is tight the allocator must be asked."""
    said = word(record, card)
    if said == TIGHT:
        return bool(predictor(replace(spec, gpu_memory_bytes=card)).fits)
    return said == FITS


class Search:
    """The largest number along an axis that fits, card after card, to `RESOLUTION`.

    It assumes that memory rises with the number: the one found fits, and one that is no further above it was seen not
    to, or is beyond the model's longest sequence. What is known of a number serves every card.
    """

    def __init__(self, spec: RunSpec, axis: str, predictor: Predictor):
        self._spec, self._axis, self._predictor = spec, axis, predictor
        longest = spec.workload().longest_seq if axis == "seq" else None
        self._most, self._ends = longest or MOST[axis], longest is not None
        self._least = min(LEAST[axis], self._most)
        self._known: dict[int, Record] = {}

    def largest(self, case: str, card: int) -> Largest:
        """The largest that fits on the card."""
        low, high = self._least - 1, self._most + 1
        for number, record in self._known.items():
            if word(record, card) == FITS:
                low = max(low, number)
            elif word(record, card) == TOO_SMALL:
                high = min(high, number)
        step, moved, ends = 0, None, set()
        while high - low - 1 > low * RESOLUTION:
            if step == 0 or len(self._known) <= 3:
                number, near = self._guess(card)
                step = math.ceil(number * RESOLUTION) if near else 0
            elif len(ends) == 2:
                number = (low + high) // 2
            else:
                # On from the guess, in longer and longer steps, until both sides are known.
                number, step = (low + step, 2 * step) if moved == "low" else (high - step, 2 * step)
            number = min(max(number, low + 1), high - 1)
            record, fitting = self._tried(number, card)
            if record.status != "ok":
                reason = f"{self._axis} {number}: {record.status}, {record.reason}"
                return Largest(case, self._axis, card, record, None, reason=reason)
            moved = "low" if fitting else "high"
            low, high = (number, high) if fitting else (low, number)
            if len(self._known) > 2:
                ends.add(moved)
        if low < self._least:
            return Largest(case, self._axis, card, self._known[self._least], 0, 0)
        record = self._known.get(low) or self._tried(low, card)[0]
        return Largest(case, self._axis, card, record, low, high - 1, longest=self._ends and low == self._most)

    def _tried(self, number: int, card: int) -> tuple[Record, bool]:
        """The prediction, and whether it fits; past the start it is made for that very card, to its limit."""
        start = getattr(self._spec, self._axis)
        spec = replace(self._spec, **{self._axis: number})
        limited = spec if number == start else replace(spec, gpu_memory_bytes=card)
        record = self._predictor(limited)
        if record.status != "ok":
            return record, False
        self._known[number] = record
        return record, fits(spec, record, card, self._predictor)

    def _guess(self, card: int) -> tuple[int, bool]:
        """Where the card's size lies on a line through what is known: its neighbours, or the first and the last.

        And whether it was not too far to go there.
        """
        known = sorted(self._known.items())
        if len(known) < 2:
            start = getattr(self._spec, self._axis)
            return (2 * start if known else start), True
        points = [(number, Need.of(record).least_bytes) for number, record in known]
        below, above = [p for p in points if p[1] <= card], [p for p in points if p[1] > card]
        (x0, y0), (x1, y1) = (below[-1], above[0]) if below and above else (points[0], points[-1])
        guess = x0 + (card - y0) * (x1 - x0) // (y1 - y0) if y1 != y0 else 2 * x1
        furthest = FURTHEST * known[-1][0]
        return min(guess, furthest), guess <= furthest


def rows(found: Sequence[Largest]) -> list[dict[str, object]]:
    """The largest numbers, flat, and how many times LoRA's each is."""
    lora = _of_lora(found)
    return [
        {
            "case": each.case,
            "axis": each.axis,
            "card_bytes": each.card_bytes,
            "card": card_name(each.card_bytes).replace("\u00a0", " "),
            "method": each.record.method,
            "label": each.record.label,
            "ours": each.record.method in FORMS,
            "number": each.number,
            "most": each.most,
            "name": each.name,
            "longest": each.longest,
            "to_lora": _to_lora(each, lora),
            "reason": each.reason,
        }
        for each in found
    ]


def verdicts(found: Sequence[Largest]) -> Iterator[dict[str, object]]:
    """SparseGrad's verdicts against LoRA: as large a batch, sequence or model, at each tolerance."""
    lora = _of_lora(found)
    for each in found:
        if each.record.method not in (PUBLISHED, *FORMS):
            continue
        rival = lora[each.case, each.axis, each.card_bytes]
        figure = _to_lora(each, lora)
        why = each.reason or rival.reason or (f"{rival.record.label} fits none" if rival.number == 0 else None)
        for tolerance in TOLERANCES:
            yield verdict_row(
                3,
                each.case,
                each.record,
                against=rival.record.label,
                definition=f"largest {each.axis} in {card_name(each.card_bytes)}".replace("\u00a0", " "),
                judgement=asdict(judge(figure, tolerance, _interval(each, rival), why)),
                evidence=f"{_said(each)} / {_said(rival)}",
            )


def _of_lora(found: Sequence[Largest]) -> dict[tuple[str, str, int], Largest]:
    return {(each.case, each.axis, each.card_bytes): each for each in found if each.record.method == "lora"}


def _to_lora(each: Largest, lora: dict[tuple[str, str, int], Largest]) -> float | None:
    rival = lora[each.case, each.axis, each.card_bytes]
    return each.number / rival.number if each.number is not None and rival.number else None


def _interval(each: Largest, rival: Largest) -> tuple[float, float] | None:
    """Between what the ratio of the largest numbers lies: neither is known better than from `number` to `most`."""
    if not each.number or not rival.number:
        return None
    return each.number / rival.most, each.most / rival.number


def _said(each: Largest) -> str:
    return each.name or ("none" if each.axis == "model" else str(each.number))
