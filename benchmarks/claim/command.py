"""`sparsegrad-bench claim`: the evidence, its verdicts, `claim.json`, the CSV files and the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from benchmarks.claim import equal_parameters, equal_peak, fixed_card, paper, sensitivity
from benchmarks.claim.cases import CASES, GPU, MEMORY_TRUE, METHODS, PUBLISHED, RIVALS, ROBERTA_BASE, Case
from benchmarks.claim.equal_parameters import AS_PRINTED, DECIDING, DEFINITIONS, MATCHED, Found
from benchmarks.claim.predictor import Predictor, made_before
from benchmarks.claim.quality import SUMMARY, Quality, scores
from benchmarks.claim.quality import judge as judge_quality
from benchmarks.claim.quality import read as read_quality
from benchmarks.claim.space import judge as judge_space
from benchmarks.claim.space import read as read_space
from benchmarks.claim.verdict import DECIDING_TOLERANCE, FAILS, HOLDS, TOLERANCES, UNDECIDED, combine
from benchmarks.collect import say
from benchmarks.harness.environment import environment
from benchmarks.harness.errors import InputError
from benchmarks.lock import held
from benchmarks.quality.space import csv_files as space_tables
from benchmarks.rows import table
from reports.capacity import CARDS
from reports.claim import write_page
from reports.page import PAGE
from reports.reading import shown
from reports.record import Record, meaning, to_csv, unwritable, write, write_bytes

SCHEMA_VERSION = 1
MOST_JOBS = 64  # each a process that has imported torch
LIMITATIONS = (
    "All memory figures are predictions for the kernels and the caching allocator of a card. On 32 steps of LoRA and "
    "full fine-tuning that others measured on a T4 such predictions were within 0.1 %; SparseGrad and MeProp were "
    "never compared with a card.",
    "The paper does not say how long its sequences were, nor the batch, sequence and dtype of its LLaMA-2 runs, nor at "
    "what point of the program its memory was read. Where it is silent a case's conditions are assumptions.",
    "SparseGrad as published is this suite's implementation of the paper's description, with torch's SparseAdam, whose "
    "moments are dense.",
    "What a decomposition and cuDNN's attention take for themselves on a card is not modelled: figures of the "
    "preparation leave out the workspace of the decomposition.",
    "The forms of SparseGrad are this suite's, not the paper's: what they save says nothing of the published method.",
)


@dataclass(frozen=True)
class Scope:
    """How much is predicted: methods and cases by reading, and cards."""

    cases: tuple[Case, ...]
    methods: tuple[str, ...]
    cpu: tuple[Case, ...]  # that are also predicted with the CPU's semantics
    at_peak: tuple[str, ...]
    reverse: bool  # whether LoRA is also sought at SparseGrad's peak
    on_cards: tuple[str, ...]
    cards: tuple[int, ...]
    axes: tuple[str, ...]
    sensitivity: bool


FULL = Scope(
    cases=CASES,
    methods=METHODS,
    cpu=(ROBERTA_BASE,),
    at_peak=("meprop-weight", PUBLISHED, *MEMORY_TRUE),
    reverse=True,
    on_cards=("full", *RIVALS, PUBLISHED, "sparsegrad-directions"),
    cards=CARDS,
    axes=fixed_card.AXES,
    sensitivity=True,
)
# What two cores predict in a minute.
QUICK = Scope(
    cases=(ROBERTA_BASE,),
    methods=("full", *RIVALS, PUBLISHED, *MEMORY_TRUE),
    cpu=(),
    at_peak=(PUBLISHED,),
    reverse=False,
    on_cards=("lora", PUBLISHED, "sparsegrad-directions"),
    cards=(CARDS[1],),
    axes=("batch",),
    sensitivity=False,
)


def claim(out: Path, quick: bool, require: str | None = None, study: Path | None = None, jobs: int = 1) -> int:
    """Write everything into `out`; 1 where a verdict is required that the claim does not have, else 0.

    `study` is the summary of a quality study, by default the committed one, which may not exist; `jobs` is how many
    predictions are made at a time.
    """
    if not 1 <= jobs <= MOST_JOBS:
        raise InputError(f"--jobs must be from 1 to {MOST_JOBS}, got {shown(jobs)}")
    if study is not None and not study.exists():
        raise InputError(f"--quality {study} does not exist: give the summary.json that `quality --out` writes")
    if reason := unwritable(out / "claim.json"):
        raise InputError(f"--out {out} cannot be written: {reason}")
    quality = read_quality(study or SUMMARY)
    judge_quality(quality)  # a summary that cannot be read is said before minutes of predictions
    space = judge_space(read_space())
    with held(out / PAGE, "--out"):
        verdict = _judge(out, quick, quality, space, jobs)
    return 0 if require in (None, verdict) else 1


def _judge(out: Path, quick: bool, quality: Mapping[str, object] | None, space, jobs: int) -> str:
    """The verdict; all that it rests on is written into `out`."""
    known = made_before(out / "records.json")
    if known:
        say(f"{len(known)} predictions of this version are in {out / 'records.json'}, and not made again")
    with Predictor(jobs=jobs, known=known) as predictor:
        try:
            found = gather(QUICK if quick else FULL, predictor, quality)
        except BaseException:
            write([*predictor.records, *predictor.unasked], out / "records.json")
            raise
    write(predictor.records, out / "records.json")
    found |= {"quick": quick, "space": space}
    write_bytes((json.dumps(found, indent=1, allow_nan=False) + "\n").encode(), out / "claim.json")
    for name in ("verdicts", "memory", "budgets", "cards", "sensitivity"):
        write_bytes(table(found[name]).encode(), out / f"{name}.csv")
    write_bytes(table(list(scores(found["quality"]["arms"]))).encode(), out / "quality.csv")
    if space is not None:
        for name, text in space_tables(space).items():
            write_bytes(text.encode(), out / name)
    write_bytes(to_csv(predictor.records).encode("utf-8", "replace"), out / "records.csv")
    page = write_page(found, out)
    say(f"the claim {found['verdict']}: {found['sentence']}")
    for reading in found["readings"]:
        say(f"  reading {reading['number']}, {reading['title']}: {reading['verdict']}. {reading['sentence']}")
    say(f"page: {page}")
    return found["verdict"]


def gather(scope: Scope, predictor: Predictor, quality: Mapping[str, object] | None) -> dict[str, object]:
    """All that `claim.json` holds but `quick` and `space`; `quality` is the study's summary, or None."""
    known = judge_quality(quality)
    axes = [(axis, case) for axis in scope.axes for case in (scope.cases if axis != "model" else (None,))]
    methods = (PUBLISHED, *MEMORY_TRUE)
    of_cases, of_cpu, of_cards, of_conditions = (
        [partial(_of_case, case, scope, predictor) for case in scope.cases],
        [partial(equal_parameters.find, case, scope.methods, predictor, device="cpu") for case in scope.cpu],
        [partial(_of_card, axis, case, scope, predictor) for axis, case in axes],
        [partial(sensitivity.find, methods, predictor, each) for each in sensitivity.conditions() if scope.sensitivity],
    )
    parts = iter(predictor.each([*of_cases, *of_cpu, *of_cards, *of_conditions]))
    both = list(islice(parts, len(of_cases)))
    found = [of_case for of_case, _ in both] + list(islice(parts, len(of_cpu)))
    largest = list(islice(parts, len(of_cards)))
    conditions = [row for rows in parts for row in rows]

    memory = [each.row(equal_parameters.reference(of_case)) for of_case in found for each in of_case]
    verdicts = [row for of_case in found for row in equal_parameters.verdicts(of_case)]
    budgets = []
    for case, (of_case, records) in zip(scope.cases, both, strict=True):
        budgets += equal_peak.rows(case, records, equal_parameters.reference(of_case, PUBLISHED))
        verdicts.append(equal_peak.verdict(case, records, known))
    cards = [row for each in largest for row in fixed_card.rows(each)]
    verdicts += [row for each in largest for row in fixed_card.verdicts(each)]

    readings = [
        _first(verdicts),
        _second(verdicts, budgets, known),
        _third(verdicts, cards),
    ]
    verdict = combine(reading["verdict"] for reading in readings)
    facts = environment("cpu")
    return {
        "schema_version": SCHEMA_VERSION,
        "claim": paper.CLAIM,
        "source": paper.SOURCE,
        "verdict": verdict,
        "sentence": _sentence(readings, known),
        "readings": readings,
        "quality": asdict(known),
        "deciding": {"method": PUBLISHED, "definition": DECIDING, "tolerance": DECIDING_TOLERANCE},
        "tolerances": list(TOLERANCES),
        "definitions": {name: meaning(name) for name in DEFINITIONS},
        "cases": [_case(case) for case in scope.cases],
        "arithmetic": [_arithmetic(of_case) for of_case in found[: len(scope.cases)]],
        "memory": memory,
        "paper": _paper(found[0]) if scope.cases and scope.cases[0] is ROBERTA_BASE else None,
        "budgets": budgets,
        "cards": cards,
        "sensitivity": conditions,
        "turns": list(sensitivity.turns(conditions)),
        "verdicts": verdicts,
        "limitations": list(LIMITATIONS),
        "environment": {
            **{name: facts[name] for name in _ENVIRONMENT},
            "card": GPU,
            "predictions": len(predictor.records),
        },
    }


def _of_case(case: Case, scope: Scope, predictor: Predictor) -> tuple[list[Found], list[Record]]:
    """Readings 1 and 2: what was found at equal parameters, and the records at equal peaks."""
    say(f"reading 1, equal parameters: {case.name}")
    found = equal_parameters.find(case, scope.methods, predictor)
    say(f"reading 2, equal peak of a step: {case.name}")
    published = equal_parameters.reference(found, PUBLISHED)
    return found, equal_peak.find(case, scope.at_peak, published, predictor, scope.reverse)


def _of_card(axis: str, case: Case | None, scope: Scope, predictor: Predictor) -> list[fixed_card.Largest]:
    """Reading 3 along an axis; the largest model has no case."""
    say(f"reading 3, fixed cards: {axis} of {case.name if case else 'decoders'}")
    if case is None:
        return fixed_card.find_model(scope.on_cards, scope.cards, predictor)
    return fixed_card.find(case, scope.on_cards, axis, scope.cards, predictor)


_ENVIRONMENT = ("created_at", "commit", "python_version", "torch_version", "transformers_version", "platform")


def deciding(verdicts: Sequence[Mapping[str, object]], reading: int) -> list[Mapping[str, object]]:
    """The verdicts that decide a reading: the published method's on a card, matched, at the strict tolerance."""
    return [
        row
        for row in verdicts
        if row["reading"] == reading
        and row["method"] == PUBLISHED
        and row["semantics"] == "cuda"
        and (reading != 1 or (row["definition"] == DECIDING and row["budgets"] == MATCHED))
        and row["tolerance"] in (None, DECIDING_TOLERANCE)
    ]


def _first(verdicts: Sequence[Mapping[str, object]]) -> dict[str, object]:
    rows = deciding(verdicts, 1)
    to_lora = [row for row in rows if row["against"].startswith("lora")]
    figure = "not obtained"
    if known := [row for row in to_lora if row["figure"] is not None]:
        figure = f"{known[0]['figure']:.2f} times LoRA's peak of a step ({known[0]['case']})"
    said = ", ".join(f"{_times(row['figure'])} on {row['case']}" for row in to_lora)
    others = ", ".join(f"{_times(row['figure'])} on {row['case']}" for row in rows if row not in to_lora)
    return {
        "number": 1,
        "title": "Equal parameters",
        "question": "Is the memory the same when as many parameters train?",
        "verdict": combine(row["verdict"] for row in rows),
        "figure": figure,
        "sentence": f"With as many trained parameters, SparseGrad's peak of a step divided by LoRA's is {said}; "
        f"divided by MeProp's, {others}.",
    }


def _second(
    verdicts: Sequence[Mapping[str, object]], budgets: Sequence[Mapping[str, object]], quality: Quality
) -> dict[str, object]:
    rows = deciding(verdicts, 2)
    none = [row for row in rows if row["verdict"] == FAILS and row["direction"] == "above"]
    reverse = next(
        (row for row in budgets if row["method"] == "lora" and row["at_peak_of"].startswith(PUBLISHED)), None
    )
    figure = "not obtained"
    if none:
        cases = ", ".join(str(row["case"]) for row in none)
        sentence = (
            f"No budget of SparseGrad as published, not even one entry a layer, has LoRA's peak of a step on {cases}."
        )
        figure = f"{none[0]['figure']:.2f} times LoRA's peak with one entry a layer ({none[0]['case']})"
    elif rows and all(row["figure"] is not None for row in rows):
        sentence = "A budget of SparseGrad as published has LoRA's peak of a step."
        figure = f"{rows[0]['figure']:.2f} times LoRA's peak ({rows[0]['case']})"
    else:
        sentence = "Whether a budget of SparseGrad as published has LoRA's peak of a step was not obtained."
    if reverse is not None and reverse["to_reference"] is not None:
        sentence += (
            f" At SparseGrad's peak LoRA could have rank {reverse['budget']:,} on {reverse['case']}, "
            f"{reverse['to_reference']:.0f} times as many parameters."
        )
    return {
        "number": 2,
        "title": "Equal peak",
        "question": "At LoRA's peak of a step, which method fine-tunes better?",
        "verdict": combine(row["verdict"] for row in rows),
        "figure": figure,
        "sentence": f"{sentence} Quality: {quality.sentence}.".replace("..", "."),
    }


def _third(verdicts: Sequence[Mapping[str, object]], cards: Sequence[Mapping[str, object]]) -> dict[str, object]:
    rows = deciding(verdicts, 3)
    counts = {word: sum(row["direction"] == word for row in rows) for word in ("below", "equal", "above")}
    figure = "not obtained"
    shown = [
        row for row in cards if row["method"] == PUBLISHED and row["axis"] == "batch" and row["to_lora"] is not None
    ]
    if shown:
        row = next((row for row in shown if row["card"] == "24 GiB"), shown[0])
        rival = next(
            other
            for other in cards
            if other["method"] == "lora" and all(other[key] == row[key] for key in ("case", "axis", "card_bytes"))
        )
        figure = f"batch {row['number']:,} where LoRA fits {rival['number']:,} ({row['case']}, {row['card']})"
    unknown = len(rows) - sum(counts.values())
    return {
        "number": 3,
        "title": "Fixed card",
        "question": "On a given card, does it fit as large a batch, sequence or model?",
        "verdict": combine(row["verdict"] for row in rows),
        "figure": figure,
        "sentence": f"Of {len(rows)} comparison{'s' * (len(rows) != 1)} with LoRA, SparseGrad as published fits less "
        f"in {counts['below']}, as much in {counts['equal']}, and more in {counts['above']}"
        + (f"; {unknown} are not decided." if unknown else "."),
    }


def _sentence(readings: Sequence[Mapping[str, object]], quality: Quality) -> str:
    """The claim's verdict in a sentence: memory, then quality."""
    first, second = readings[:2]
    memory = {
        HOLDS: "SparseGrad as published has its rivals' peak of a step when as many parameters train",
        FAILS: f"SparseGrad as published does not have its rivals' memory: it takes {first['figure']} when as many "
        "parameters train",
        UNDECIDED: "Whether SparseGrad as published has its rivals' memory is not decided",
    }[str(first["verdict"])]
    if first["verdict"] == second["verdict"] == FAILS and not quality.studied:
        memory += ", and none of its budgets brings it down to LoRA's"
    return f"{memory}; {quality.sentence}."


def _times(figure: object) -> str:
    return "not obtained" if figure is None else f"{figure:.3f}"


def _case(case: Case) -> dict[str, object]:
    return {"name": case.name, **case.workload, "lora": case.reference, "kept": case.kept, "note": case.note}


def _paper(found: Sequence[Found]) -> dict[str, object]:
    """RoBERTa-base beside the paper's tables: which definition has its ratios, and what arithmetic says of sizes."""
    full = next(each.record for each in found if each.record.method == "full")
    lora = equal_parameters.reference(found)
    printed = next(each.record for each in found if each.budgets == AS_PRINTED)
    names = {"full": full, "lora": lora, "sparsegrad": printed}

    def ratios(sizes: Mapping[str, int | None]) -> dict[str, float | None]:
        return {
            name: None if None in (sizes[a], sizes[b]) else sizes[a] / sizes[b]
            for name, (a, b) in {name: name.split("/") for name in paper.ratios()}.items()
        }

    definitions: list[dict[str, object]] = []
    for definition in DEFINITIONS:
        sizes = {name: getattr(record, definition) for name, record in names.items()}
        found_ratios = ratios(sizes)
        definitions.append(
            {"what": definition, "bytes": sizes, "ratios": found_ratios, "agrees": paper.reproduced(found_ratios)}
        )
    for how, sizes in paper.counted(full, lora, printed).items():
        definitions.append(
            {
                "what": f"counted: weights, bases and moments, {how}",
                "bytes": sizes,
                "ratios": ratios(sizes),
                "agrees": paper.reproduced(ratios(sizes)),
            }
        )
    return {
        "memory_mb": {name: paper.memory_mb(name) for name in paper.NAMES},
        "ratios": paper.ratios(),
        "agreement": paper.AGREEMENT,
        "definitions": definitions,
        "floors": [{"what": what, "bytes": size} for what, size in paper.floors(full)],
        "total_params": full.total_params,
        "by_batch": [{"batch": batch, **means} for batch, means in paper.by_batch().items()],
        "peak_step_bytes": full.peak_step_bytes,
        "finding": _finding(definitions, full),
    }


def _finding(definitions: Sequence[Mapping[str, object]], full: Record) -> str:
    """Which definitions have the paper's ratios, and that its sizes are below what training in float32 must have."""
    agree = [str(each["what"]) for each in definitions if each["agrees"] and each["what"] in DEFINITIONS]
    counted = [str(each["what"]) for each in definitions if each["agrees"] and each["what"] not in DEFINITIONS]
    said = f"Its ratios are those of {', '.join(agree)}." if agree else "No definition of memory here has its ratios."
    if counted and not agree:
        said += (
            f" A count has them that leaves out gradients and activations ({'; '.join(counted)}); torch's SparseAdam, "
            "though, stores dense moments. That ratios agree does not prove how the paper's were obtained."
        )
    (_, weights), (_, rest), (_, step) = paper.floors(full)
    printed = paper.memory_mb("full")
    if printed * 2**20 < rest:
        said += (
            f" {printed:,.0f} MB cannot be the peak of training in float32 with Adam: {full.total_params / 1e6:.1f} "
            f"million parameters take {weights / 1e6:,.0f} MB, with two moments {rest / 1e6:,.0f} MB at rest, and with "
            f"gradients {step / 1e6:,.0f} MB before there is any activation."
        )
    (small, least), *_, (large, most) = paper.by_batch().items()
    growth = f"{100 * (most['full'] / least['full'] - 1):+.1f} %"
    return f"{said} Nor do its sizes follow the batch: from {small} to {large} full fine-tuning's change by {growth}."


def _arithmetic(found: Sequence[Found]) -> dict[str, object]:
    """How many parameters the budgets that the paper gives for LoRA and SparseGrad stand for."""
    case, lora = found[0].case, equal_parameters.reference(found)
    printed = next(each.record for each in found if each.budgets == AS_PRINTED)
    layers = printed.budget_params // case.kept
    return {
        "case": case.name,
        "lora": lora.budget_params,
        "sparsegrad": printed.budget_params,
        "ratio": printed.budget_params / lora.budget_params,
        "how": f"on {layers} layers, rank {case.rank} is {lora.budget_params // layers:,} parameters a layer on "
        f"average, and SparseGrad keeps {case.kept:,} entries",
    }
