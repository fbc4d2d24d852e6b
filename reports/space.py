"""The section of the claim's page on the sparse space: its figures and tables, out of what `claim.json` holds of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reports import sheet, tables
from reports.cells import Cell, Table
from reports.figures import space as figures
from reports.page import Illustration, renderings

Found = Mapping[str, object]
Rows = Sequence[Mapping[str, object]]

FILES = (
    ("space-energy.csv", "the shares of energy by task, training, step, layer and space"),
    ("space-zero-rows.csv", "the rows of dL/dY by task, padding and layer"),
)
# As a row says that nothing was trained yet.
_START = "none"
_COUNTS = ("tokens", "padding", "zero", "zero_padding", "below_1_pct", "below_10_pct")


@dataclass(frozen=True)
class Section:
    """What the page shows of a measurement."""

    energy: Illustration
    ageing: Illustration | None
    kinds: Table
    ages: Table
    layers: Table
    rows: Table
    conditions: str
    made_with: str


def section(found: Found | None, out: Path) -> Section | None:
    """The section, its figures written into `out`; None where nothing was measured."""
    if found is None:
        return None
    densities, density = found["densities"], found["density"]
    at = densities.index(density)
    start = [row for row in found["energy"] if row["training"] == _START]
    title = "Energy of held-out weight gradients in their largest entries"
    energy = Illustration(
        renderings(_both(figures.draw_energy, title, start, densities), out / "space-energy.png"),
        figures.describe_energy(start, densities, density),
        "The share of the squared Frobenius norm of a batch's weight gradient that its largest entries hold, on "
        "batches whose texts the bases have not seen. Lines are means over the layers, bands go from the least to the "
        "most of a layer. With one factor transposed, or with random matrices, the rotation is as orthogonal and means "
        "nothing.",
    )
    ageing = None
    if len(start) < len(found["energy"]):
        title = f"Energy in the largest {_percent(density)}, over training"
        ageing = Illustration(
            renderings(_both(figures.draw_ageing, title, found["energy"], at), out / "space-training.png"),
            figures.describe_ageing(found["energy"], at),
            "The method makes its bases once, before training. Beside them, bases made anew at that step, as they were "
            "at the start. Bands as above.",
        )
    return Section(
        energy,
        ageing,
        _kinds_table(found),
        _ages_table(found),
        _layers_table(found, start, at),
        _rows_table(found),
        _conditions(found["settings"]),
        _made_with(found["environment"]),
    )


def _both(draw, *arguments) -> dict[sheet.Layout, sheet.Sheet]:
    return {layout: draw(*arguments, layout=layout) for layout in (sheet.WIDE, sheet.NARROW)}


def _kinds_table(found: Found) -> Table:
    """A row for each task and kind before the first step, and one for each task's mean ratio with the target on it."""
    kinds = [row for row in found["kinds"] if row["training"] == _START]
    spaces = [name for name in figures.NAMES if name in kinds[0]["shares"]]
    rows = []
    for target in (each for each in found["targets"] if each["training"] == _START):
        for row in (each for each in kinds if each["task"] == target["task"]):
            cells = [
                Cell(f"{row['task']}, {row['kind']}"),
                *(Cell(_percent(row["shares"][name]), kind="number") for name in spaces),
                Cell(f"{row['ratio']:.2f}", f"{row['least']:.2f} to {row['most']:.2f} by layer", "number"),
            ]
            rows.append((None, cells))
        mean = _on_target(target["ratio"], target["met"])
        rows.append((None, [Cell(f"{target['task']}, mean of the kinds"), *(Cell("") for _ in spaces), mean]))
    caption = f"Energy in the largest {_percent(found['density'])}, before the first step"
    return Table(caption, ["task, kind", *(figures.NAMES[name] for name in spaces), "basis / raw"], rows)


def _on_target(ratio: float, met: bool) -> Cell:
    return Cell(f"{ratio:.2f}", "target met" if met else "target missed", "number holds" if met else "number fails")


def _ages_table(found: Found) -> Table:
    """The ratios of each moment of training with the bases of the start and with new ones, and the target on means."""
    kinds = list(dict.fromkeys(row["kind"] for row in found["kinds"]))
    by_key = {(row["task"], row["training"], row["step"], row["kind"]): row for row in found["kinds"]}
    rows = []
    for target in found["targets"]:
        of_kinds = [by_key[target["task"], target["training"], target["step"], kind] for kind in kinds]
        start = target["training"] == _START
        cells = [
            Cell(target["task"]),
            Cell("" if start else target["training"]),
            Cell(str(target["step"]), kind="number"),
        ]
        cells += [Cell(f"{row['ratio']:.2f}", kind="number") for row in of_kinds]
        cells.append(_on_target(target["ratio"], target["met"]))
        if start:
            cells += [Cell("")] * (len(kinds) + 1)
        else:
            cells += [Cell(f"{row['anew']:.2f}", kind="number") for row in of_kinds]
            cells.append(_on_target(target["anew"], target["anew_meets"]))
        rows.append((None, cells))
    headings = ["task", "trained with", "step"]
    for bases in ("bases of the start", "new bases"):
        headings += [f"{bases}, {kind}" for kind in kinds] + [f"{bases}, mean"]
    return Table(
        f"Energy in the largest {_percent(found['density'])} to that without a basis, over training", headings, rows
    )


def _layers_table(found: Found, start: Rows, at: int) -> Table:
    """The same by layer."""
    spaces = [name for name in figures.NAMES if any(row["space"] == name for row in start)]
    shares = {(row["task"], row["kind"], row["layer"], row["space"]): row["kept"][at] for row in start}
    rows = [
        (
            None,
            [
                Cell(f"{task}, {kind} {layer}"),
                *(Cell(_percent(shares[task, kind, layer, name]), kind="number") for name in spaces),
            ],
        )
        for task, kind, layer in dict.fromkeys(key[:3] for key in shares)
    ]
    caption = f"Energy in the largest {_percent(found['density'])} by layer, before the first step"
    return Table(caption, ["task, kind, layer", *(figures.NAMES[name] for name in spaces)], rows)


def _rows_table(found: Found) -> Table:
    """Zero rows of dL/dY by layer, its kinds together, with padding and without, before the first step."""
    start = [row for row in found["zero_rows"] if row["training"] == _START]
    paddings = list(dict.fromkeys(row["padded"] for row in start))
    sums: dict[tuple[str, int, str], Counter[str]] = {}
    for row in start:
        counts = {name: value for name, value in row.items() if name in _COUNTS}
        sums.setdefault((row["task"], row["layer"], row["padded"]), Counter()).update(counts)
    rows = []
    for task, layer in dict.fromkeys(key[:2] for key in sums):
        of_layer = [sums[task, layer, padded] for padded in paddings]
        cells = [Cell(f"{task}, {layer}")]
        for row in of_layer:
            cells += [
                Cell(_percent(row["padding"] / row["tokens"]), kind="number"),
                Cell(_percent(row["zero"] / row["tokens"]), kind="number"),
            ]
        text = of_layer[0]["tokens"] - of_layer[0]["padding"]
        zero = of_layer[0]["zero"] - of_layer[0]["zero_padding"]
        cells += [
            Cell(_percent(count / text), kind="number")
            for count in (zero, zero + of_layer[0]["below_1_pct"], zero + of_layer[0]["below_10_pct"])
        ]
        rows.append((None, cells))
    headings = ["task, layer"]
    for padded in paddings:
        headings += [f"padded {padded}: padding", f"padded {padded}: zero"]
    headings += ["text: zero", "text: at most 1 % of the largest", "text: at most 10 % of it"]
    return Table("Rows of dL/dY, one a token, before the first step", headings, rows)


def _conditions(settings: Found) -> str:
    """How it was measured."""
    rates = ", ".join(f"{name} {rate:g}" for name, rate in settings["learning_rates"].items())
    steps = ", ".join(f"{number} on {task}" for task, number in settings["steps"].items())
    size = "all" if settings["train_size"] is None else settings["train_size"]
    return (
        f"{settings['model']}, {size} training texts of each task, batches of {settings['batch']} texts cut off at "
        f"{settings['longest']} tokens and padded to the longest, or for the rows of dL/dY to {settings['padded_to']} "
        f"tokens besides; bases of {settings['calibration_steps']} training batches, gradients of "
        f"{settings['held_out_batches']} batches of the validation split, in training mode. Training steps: {steps}, "
        f"at rates that rise and fall linearly ({rates}), with train_rest = {settings['train_rest']}; sparsegrad at a "
        f"density of {_percent(settings['density'])}. Seed {settings['seed']}."
    )


def _made_with(environment: Found) -> str:
    names = ("created_at", "commit", "torch_version", "transformers_version", "device_name", "threads")
    return "; ".join(f"{name.replace('_', ' ')} {tables.plain(environment[name])}" for name in names)


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 10 or percent == round(percent) else f"{percent:.1f} %"
