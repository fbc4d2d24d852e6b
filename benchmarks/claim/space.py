"""The one place where the measurement of the sparse space enters the claim: what it says of the paper's premise.

`benchmarks/reference/quality/space.json` is what `sparsegrad-bench quality --space` wrote, with its settings and its
environment; benchmarks/quality/space.py says what its rows are. It bears on no verdict: the claim is about memory and
quality, the premise is why the method might work.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.harness.errors import InputError
from benchmarks.quality.space import ANEW, BASIS, NOT_TRAINED, RANDOM, RAW, U_ALONE, U_TRANSPOSED, V_ALONE, V_TRANSPOSED

SPACE = Path(__file__).parent.parent / "reference" / "quality" / "space.json"
# The paper's abstract.
PREMISE = "We transfer layer gradients to a space where only about 1% of the layer's elements remain significant."
# The target: what the largest entries in the basis hold, to what those of the gradient itself hold, is above this
# on the mean of the kinds, and above that on each of them.
DENSITY, MEAN_ABOVE, EACH_ABOVE = 0.01, 1.3, 1.0

Rows = Sequence[Mapping[str, object]]


def read(path: Path = SPACE) -> dict[str, object] | None:
    """The measurement; None where there is none. Raises `InputError` where it cannot be read."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"the measurement of the sparse space, {path}, cannot be read: {error}") from error


def judge(space: Mapping[str, object] | None) -> dict[str, object] | None:
    """What the claim's page shows of a measurement: its rows, and what they say; None of none.

    `kinds` has a row for each task, moment and kind of layer with the shares that the largest entries hold at the
    published density, means over layers, by space. `ratio` is the share in the basis to that of the gradient itself,
    `least` and `most` those of a layer; after training there is `anew` besides, of bases made at that moment. `targets`
    has a row for each task and moment: the means of `ratio` and `anew` over kinds, and whether they meet the target.

    Raises:
        InputError: for what is no such measurement.
    """
    if space is None:
        return None
    try:
        moments = dict.fromkeys((row["task"], row["training"], row["step"]) for row in space["energy"])
        kinds = [_of_kind(space, *moment, kind) for moment in moments for kind in _unique(space["energy"], "kind")]
        targets = [_target(*moment, kinds) for moment in moments]
        findings = [
            *_on_start(targets, kinds),
            *_on_share(space, kinds),
            *_on_sides(kinds),
            *_on_age(targets),
            *_on_rows(space),
        ]
        return {
            "premise": PREMISE,
            "settings": space["settings"],
            "environment": space["environment"],
            "densities": space["densities"],
            "energy": space["energy"],
            "zero_rows": space["zero_rows"],
            "density": DENSITY,
            "kinds": kinds,
            "targets": targets,
            "sentence": _in_short(targets),
            "findings": findings,
        }
    except (KeyError, TypeError, IndexError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"the measurement of the sparse space lacks what the claim reads of it: {error!r}") from error


def _of_kind(space: Mapping[str, object], task: str, training: str, step: int, kind: str) -> dict[str, object]:
    at = space["densities"].index(DENSITY)
    rows = _select(space["energy"], task=task, training=training, step=step, kind=kind)
    by_space = {
        name: {row["layer"]: row["kept"][at] for row in _select(rows, space=name)} for name in _unique(rows, "space")
    }
    shares = {name: fmean(by_layer.values()) for name, by_layer in by_space.items()}
    ratios = [share / by_space[RAW][layer] for layer, share in by_space[BASIS].items()]
    return {
        "task": task,
        "training": training,
        "step": step,
        "kind": kind,
        "shares": shares,
        "ratio": shares[BASIS] / shares[RAW],
        "anew": shares[ANEW] / shares[RAW] if ANEW in shares else None,
        "least": min(ratios),
        "most": max(ratios),
    }


def _target(task: str, training: str, step: int, kinds: Rows) -> dict[str, object]:
    rows = _select(kinds, task=task, training=training, step=step)
    ratios, anew = [row["ratio"] for row in rows], [row["anew"] for row in rows]
    made_anew = training != NOT_TRAINED
    return {
        "task": task,
        "training": training,
        "step": step,
        "ratio": fmean(ratios),
        "met": _meets(ratios),
        "anew": fmean(anew) if made_anew else None,
        "anew_meets": _meets(anew) if made_anew else None,
    }


def _meets(ratios: Sequence[float]) -> bool:
    return fmean(ratios) > MEAN_ABOVE and min(ratios) > EACH_ABOVE


def _on_start(targets: Rows, kinds: Rows) -> Iterator[str]:
    """Whether the basis gathers the energy before the first step, and in which kinds."""
    said = []
    for target in _select(targets, training=NOT_TRAINED):
        each = ", ".join(
            f"{row['kind']} {row['ratio']:.2f}" for row in _select(kinds, task=target["task"], training=NOT_TRAINED)
        )
        said.append(f"{target['ratio']:.2f} on {target['task']} ({each}), {_MET[target['met']]}")
    yield (
        f"Energy in the largest {_percent(DENSITY)} of the entries, in the basis to without it, before the first step "
        f"and as the mean of the kinds: {'; '.join(said)}. The target is above {MEAN_ABOVE} on the mean and above "
        f"{EACH_ABOVE} on each kind."
    )


def _on_share(space: Mapping[str, object], kinds: Rows) -> Iterator[str]:
    """How much the largest entries in the basis leave out."""
    start = _select(kinds, training=NOT_TRAINED)
    of_layers = [row["kept"] for row in _select(space["energy"], training=NOT_TRAINED, space=BASIS)]
    at, most = space["densities"].index(DENSITY), max(space["densities"])
    last = space["densities"].index(most)
    yield (
        f"In the basis the largest {_percent(DENSITY)} hold {_range(row['shares'][BASIS] for row in start)} of the "
        f"energy by task and kind, {_range(kept[at] for kept in of_layers)} by layer, and the largest {_percent(most)} "
        f"{_range(kept[last] for kept in of_layers)} by layer: the other entries share the rest."
    )


def _on_sides(kinds: Rows) -> Iterator[str]:
    """Where one rotation alone does as well as both, and what other rotations do."""
    start = _select(kinds, training=NOT_TRAINED)
    better = [
        f"{name} on {row['task']}, {row['kind']} ({100 * row['shares'][name]:.1f} against "
        f"{100 * row['shares'][BASIS]:.1f} %)"
        for row in start
        for name in (U_ALONE, V_ALONE)
        if row["shares"][name] >= row["shares"][BASIS]
    ]
    alone = (
        f"One rotation alone holds as much as both or more: {', '.join(better)}."
        if better
        else "Both rotations together hold more than either alone, on each task and kind."
    )
    random, transposed = (
        _range(row["shares"][name] for row in start for name in names)
        for names in ((RANDOM,), (U_TRANSPOSED, V_TRANSPOSED))
    )
    yield (
        f"{alone} In the basis with one factor transposed the largest {_percent(DENSITY)} hold {transposed}, after "
        f"random rotations {random}."
    )


def _on_age(targets: Rows) -> Iterator[str]:
    """What the bases of the start are worth when the training ends."""
    if ends := _ends(targets):
        said = ", ".join(f"{row['ratio']:.2f} ({row['task']}, {row['training']})" for row in ends)
        yield (
            f"The bases age, and the method makes them once. At the end of training the same ratio is {said} in those "
            f"of the start, and {min(row['anew'] for row in ends):.2f} to {max(row['anew'] for row in ends):.2f} in "
            "bases made anew."
        )


def _ends(targets: Rows) -> list[Mapping[str, object]]:
    """The last moment of each task and way to train."""
    last = {(row["task"], row["training"]): row for row in sorted(targets, key=lambda row: row["step"])}
    return [row for (_, training), row in last.items() if training != NOT_TRAINED]


def _in_short(targets: Rows) -> str:
    """Where the target is met, in a sentence."""
    start, ends = _select(targets, training=NOT_TRAINED), _ends(targets)
    said = f"By the target below it does on {sum(row['met'] for row in start)} of {len(start)} tasks before training"
    if ends:
        met, anew = (sum(row[name] for row in ends) for name in ("met", "anew_meets"))
        said += (
            f"; at the end of training in {met} of {len(ends)} cases with the bases of the start, which are those that "
            f"the method has, and in {anew} of {len(ends)} with new ones"
        )
    return f"{said}."


def _on_rows(space: Mapping[str, object]) -> Iterator[str]:
    """What part of the zero rows of dL/dY is padding, and which rows of text are zero."""
    start = _select(space["zero_rows"], training=NOT_TRAINED)
    said = []
    for padded in _unique(start, "padded"):
        rows = _select(start, padded=padded)
        zero, padding, tokens = (sum(row[name] for row in rows) for name in ("zero", "zero_padding", "tokens"))
        part = f", of which {_percent(padding / zero)} are padding" if zero else ""
        said.append(f"{_percent(zero / tokens)} with batches padded {padded}{part}")
    yield f"Of the rows of dL/dY, over all layers, exactly zero are {'; '.join(said)}."
    last = max(row["layer"] for row in start)
    of_last, others = _select(start, layer=last), [row for row in start if row["layer"] != last]
    if not others:
        return
    small = [
        f"{_range((_zero_text(row) + row['below_1_pct']) / _text(row) for row in _select(others, task=task))} on {task}"
        for task in _unique(others, "task")
    ]
    zero = sum(map(_zero_text, others))
    yield (
        f"Of the rows of the texts' own tokens {_percent(zero / sum(map(_text, others))) if zero else 'none'} are zero "
        f"in the layers before the last, and "
        f"{_percent(sum(map(_zero_text, of_last)) / sum(map(_text, of_last)))} in the last, of which the head reads "
        f"each text's first token alone. Before the last, {' and '.join(small)} have at most 1 % of the largest norm, "
        "by layer and kind."
    )


def _text(row: Mapping[str, object]) -> int:
    return row["tokens"] - row["padding"]


def _zero_text(row: Mapping[str, object]) -> int:
    return row["zero"] - row["zero_padding"]


_MET = {True: "which meets the target", False: "which misses the target"}


def _range(shares: Iterable[float]) -> str:
    """As `5 to 20 %`, or `5 %` where all are alike."""
    shares = list(shares)
    low, high = (_percent(each(shares)) for each in (min, max))
    return low if low == high else f"{low.removesuffix(' %')} to {high}"


def _percent(share: float) -> str:
    """As `5 %`, with a decimal below ten where there is something in it."""
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 9.95 or percent == round(percent) else f"{percent:.1f} %"


def _select(rows: Rows, **wanted: object) -> list[Mapping[str, object]]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def _unique(rows: Rows, name: str) -> list:
    return list(dict.fromkeys(row[name] for row in rows))
