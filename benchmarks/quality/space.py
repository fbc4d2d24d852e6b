"""Does the sparse space exist? What the largest entries of held-out weight gradients hold, in the basis and without it.

SparseGrad's premise is that few entries of a weight gradient G (D_out, D_in) matter once it stands in the gradients'
basis, V G U^T. Measured is the share of its energy, the squared Frobenius norm, that its largest entries hold, on
batches of the validation split: the bases have seen none of their texts. Controls say what is the basis's merit and
what any matrix has: G as it is, one side rotated alone, one factor transposed (the wrong orientation), and random
orthogonal matrices.

And: which rows of dL/dY (a row for each token) are zero. The method's sparse product skips them.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.collect import check_destination, say
from benchmarks.harness import models
from benchmarks.harness.environment import environment
from benchmarks.harness.errors import InputError
from benchmarks.harness.protocol import Trained, build, ready, training_step, untracked
from benchmarks.harness.spec import RunSpec
from benchmarks.quality.tasks import TaskWorkload, load_task
from benchmarks.quality.training import rate_factor
from benchmarks.rows import table
from reports.record import unwritable, write_bytes
from sparsegrad import calibrate
from sparsegrad.basis import TransitionMatrices
from sparsegrad.gradients import stream_gradients
from sparsegrad.support import resolve_nnz

SCHEMA_VERSION = 1
FILE = "space.json"
# Shares of a gradient's entries that are kept.
DENSITIES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)

RAW, BASIS, ANEW = "raw", "basis", "basis made anew"
U_ALONE, V_ALONE = "U alone", "V alone"
U_TRANSPOSED, V_TRANSPOSED = "U transposed", "V transposed"
RANDOM = "random"

# How the model is trained meanwhile; both rates are among those that the study tries for these arms.
NOT_TRAINED, FULL, PUBLISHED = "none", "full", "sparsegrad"
RATES = {FULL: 1e-4, PUBLISHED: 1e-3}
# Of the training steps, where gradients are looked at.
MOMENTS = (0.25, 1.0)

Row = dict[str, object]


@dataclass(frozen=True)
class Settings:
    """What is measured; what is not given is what the committed result has.

    Batches are padded to their longest text, cut off at `longest` tokens, as in the study; for the rows of dL/dY they
    are padded to `padded_to` tokens besides. `density` is what the published method trains with.
    """

    model: str = "minilm-l6"
    tasks: tuple[str, ...] = ("trec", "amazon")
    train_size: int | None = 300
    epochs: int = 8
    batch: int = 16
    longest: int = 64
    padded_to: int = 128
    train_rest: str = "none"
    density: float = 0.01
    calibration_steps: int = 30
    held_out_batches: int = 4
    seed: int = 0
    hub: bool = False

    def __post_init__(self):
        if self.epochs < 1:
            raise InputError(f"--epochs must be at least 1, got {self.epochs}")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise InputError(f"--tasks must be one or more, each once, got {', '.join(self.tasks) or 'none'}")


def energy_kept(gradient: Tensor, densities: Sequence[float] = DENSITIES) -> list[float]:
    """Shares of the squared Frobenius norm that the largest entries hold, one for each density, in 0 .. 1.

    Raises:
        ValueError: if the gradient is zero throughout: nothing has a share of it.
    """
    squares = gradient.double().square().flatten()
    whole = squares.sum()
    if not whole > 0:
        raise ValueError("a gradient of zeros has no energy to share")
    counts = [resolve_nnz(gradient.shape, density=density) for density in densities]
    held = squares.topk(max(counts)).values.cumsum(0)
    return [float(held[count - 1] / whole) for count in counts]


def views(gradient: Tensor, basis: TransitionMatrices, random: TransitionMatrices) -> Iterator[tuple[str, Tensor]]:
    """G (D_out, D_in) as it is, in the basis, and in the controls' spaces, one at a time with its name."""
    U, V = basis.U, basis.V
    yield RAW, gradient
    right = gradient @ U.T
    yield U_ALONE, right
    yield BASIS, V @ right
    yield V_TRANSPOSED, V.T @ right
    del right
    left = V @ gradient
    yield V_ALONE, left
    yield U_TRANSPOSED, left @ U
    del left
    yield RANDOM, random.V @ gradient @ random.U.T


def random_basis(d_out: int, d_in: int, seed: int) -> TransitionMatrices:
    """Two random orthogonal matrices, U (D_in, D_in) and V (D_out, D_out)."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, size, generator=generator)).Q for size in (d_in, d_out))
    return TransitionMatrices(U, V)


@dataclass
class RowCounts:
    """Rows of dL/dY, one a token, counted over batches: all; those of padding; those that are zero throughout.

    `below_1_pct` and `below_10_pct` are rows of text that are not zero and whose norm is at most that share of the
    largest in their batch.
    """

    tokens: int = 0
    padding: int = 0
    zero: int = 0
    zero_padding: int = 0
    below_1_pct: int = 0
    below_10_pct: int = 0

    def add(self, dy: Tensor, is_text: Tensor) -> None:
        """Count one batch's dL/dY (T, D_out); `is_text` (T,) is False at padding."""
        norms = dy.double().norm(dim=1)
        # Not the norm: squares of tiny entries are zero.
        zero = (dy == 0).all(dim=1)
        text_only = is_text & ~zero
        self.tokens += len(dy)
        self.padding += int((~is_text).sum())
        self.zero += int(zero.sum())
        self.zero_padding += int((zero & ~is_text).sum())
        self.below_1_pct += int((text_only & (norms <= 0.01 * norms.max())).sum())
        self.below_10_pct += int((text_only & (norms <= 0.1 * norms.max())).sum())


def measure(settings: Settings, say: Callable[[str], None]) -> dict[str, object]:
    """The whole measurement, as `space.json` holds it: settings, environment, and flat rows `energy` and `zero_rows`.

    On one thread; one gradient lives at a time. The same settings give the same rows on the same machine.

    Raises:
        InputError: as `TaskWorkload` and `Task.training_set`.
        Diverged: if a model does not train.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # All of them first: an error should not come after minutes.
        tasks = [_Task.of(settings, name) for name in settings.tasks]
        energy, zero_rows = [], []
        for task in tasks:
            for rows, found in zip((energy, zero_rows), task.measure(say), strict=True):
                rows += found
        facts = environment("cpu")
    finally:
        torch.set_num_threads(threads)
    return {
        "schema_version": SCHEMA_VERSION,
        "settings": {
            **asdict(settings),
            "learning_rates": RATES,
            "steps": {task.name: task.steps for task in tasks},
        },
        "densities": list(DENSITIES),
        "energy": energy,
        "zero_rows": zero_rows,
        "environment": facts,
    }


@dataclass(frozen=True)
class _Task:
    """One task's workload on its training set and on held-out texts, padded to the longest and to a fixed length."""

    settings: Settings
    name: str
    seed: int
    workload: TaskWorkload
    held_out: list[Mapping[str, Tensor]]
    padded: list[Mapping[str, Tensor]]
    layers: Mapping[str, Sequence[str]]
    steps: int

    @classmethod
    def of(cls, settings: Settings, name: str) -> _Task:
        task = load_task(name, settings.hub)
        seed = task.seed(settings.seed)
        training_set = task.training_set(settings.train_size, seed)
        workload = TaskWorkload(
            task,
            training_set,
            models.resolve(settings.model, hub=settings.hub),
            batch=settings.batch,
            seq=settings.longest,
            dtype="float32",
            device="cpu",
            seed=seed,
            targets="mlp",
        )
        # A copy, not a workload of its own: that would standardise ratings by the held-out texts.
        other = copy.copy(workload)
        other.text = replace(workload.text, train=task.data.validation)
        held_out = list(islice(other.batches(), settings.held_out_batches))
        length = min(settings.padded_to, workload.longest_seq or settings.padded_to)
        padded = [_padded_to(length, batch, workload.tokenizer.pad_token_id) for batch in held_out]
        steps = math.ceil(len(training_set) / settings.batch) * settings.epochs
        return cls(settings, name, seed, workload, held_out, padded, workload.layers(workload.skeleton()), steps)

    def measure(self, say: Callable[[str], None]) -> tuple[list[Row], list[Row]]:
        """The rows on energy and those on the rows of dL/dY."""
        energy, zero_rows = [], []
        say(f"{self.name}: the published method makes its bases of {self.settings.calibration_steps} batches")
        published = self._begun(PUBLISHED)
        bases = {kind: published.model.get_submodule(names[0]).basis for kind, names in self.layers.items()}
        say(f"{self.name}: held-out gradients before the first step")
        start = self.workload.build()
        energy += self._energy(start, 0, NOT_TRAINED, self._all_views(start, bases))
        zero_rows += self._zero_rows(start, 0, NOT_TRAINED)
        del start
        for training in (FULL, PUBLISHED):
            state = published if training == PUBLISHED else self._begun(training)
            schedules = [LambdaLR(optimizer, rate_factor(self.steps)) for optimizer in state.optimizers]
            batches, done = self.workload.batches(), 0
            torch.manual_seed(self.seed)
            for moment in sorted({max(1, round(share * self.steps)) for share in MOMENTS}):
                say(f"{self.name}, {training}: trains to step {moment}")
                for _ in range(moment - done):
                    training_step(state, next(batches), untracked)
                    for schedule in schedules:
                        schedule.step()
                done = moment
                say(f"{self.name}, {training}: held-out gradients at step {moment}")
                # Dropout in training goes on as if nobody had looked.
                with torch.random.fork_rng(devices=()):
                    plain = state.method.export(copy.deepcopy(state.model))
                    energy += self._energy(plain, moment, training, self._aged_views(plain, bases))
                    if training == FULL and moment == self.steps:
                        zero_rows += self._zero_rows(plain, moment, training)
                    del plain
        return energy, zero_rows

    def _begun(self, training: str) -> Trained:
        """A model that is ready to train in this way."""
        spec = RunSpec(
            method=training,
            budget=self.settings.density if training == PUBLISHED else None,
            model=self.settings.model,
            batch=self.settings.batch,
            seq=self.settings.longest,
            train_rest=self.settings.train_rest,
            optimizer_impl="fused",
            calibration_steps=self.settings.calibration_steps,
            lr=RATES[training],
            seed=self.seed,
            hub=self.settings.hub,
            threads=1,
        )
        method, model, _ = build(spec, self.workload)
        method.prepare(model, self.workload.batches())
        return ready(spec, self.workload, method, model)

    def _all_views(self, model: nn.Module, bases: Mapping[str, TransitionMatrices]):
        random = {}
        for kind, names in self.layers.items():
            random[kind] = random_basis(*model.get_submodule(names[0]).weight.shape, self.settings.seed)
        return lambda kind, gradient: views(gradient, bases[kind], random[kind])

    def _aged_views(self, model: nn.Module, bases: Mapping[str, TransitionMatrices]):
        """The gradient as it is, in the bases that were made at the start, and in those made of the model as it is."""
        torch.manual_seed(self.seed)
        steps = islice(self.workload.batches(), self.settings.calibration_steps)
        new = calibrate(model, self.layers, steps, self.workload.run_backward)

        def aged(kind: str, gradient: Tensor) -> Iterator[tuple[str, Tensor]]:
            yield RAW, gradient
            for name, basis in ((BASIS, bases[kind]), (ANEW, new[kind])):
                yield name, basis.V @ gradient @ basis.U.T

        return aged

    def _energy(
        self,
        model: nn.Module,
        step: int,
        training: str,
        seen: Callable[[str, Tensor], Iterable[tuple[str, Tensor]]],
    ) -> list[Row]:
        """A row for each layer and space: the shares kept, as means over the held-out batches."""
        sums: dict[tuple[str, str, str], Tensor] = {}

        def consume(kind: str, name: str, dy: Tensor, x: Tensor) -> None:
            for space, matrix in seen(kind, dy.T @ x):
                curve = torch.tensor(energy_kept(matrix), dtype=torch.float64)
                sums[kind, name, space] = sums.get((kind, name, space), 0) + curve

        # The same dropout at every moment.
        torch.manual_seed(self.seed)
        stream_gradients(model, self.layers, self.held_out, self.workload.run_backward, consume)
        return [
            {
                "task": self.name,
                "training": training,
                "step": step,
                "kind": kind,
                "layer": number,
                "space": space,
                "kept": [_rounded(share) for share in (curve / len(self.held_out)).tolist()],
            }
            for kind, names in self.layers.items()
            for number, name in enumerate(names, start=1)
            for (_, of, space), curve in sums.items()
            if of == name
        ]

    def _zero_rows(self, model: nn.Module, step: int, training: str) -> list[Row]:
        """A row for each padding and layer: the counts of `RowCounts` over the held-out batches."""
        rows = []
        length = self.padded[0]["input_ids"].shape[1]
        for padding, batches in (("to the longest text", self.held_out), (f"to {length} tokens", self.padded)):
            torch.manual_seed(self.seed)
            for (kind, number), counts in row_counts(model, self.layers, batches, self.workload.run_backward).items():
                where = {"task": self.name, "training": training, "step": step, "padded": padding}
                rows.append({**where, "kind": kind, "layer": number, **asdict(counts)})
        return rows


def row_counts(
    model: nn.Module,
    layers: Mapping[str, Sequence[str]],
    batches: Iterable[Mapping[str, Tensor]],
    backward: Callable[[nn.Module, object], None],
) -> dict[tuple[str, int], RowCounts]:
    """(kind, number of the layer from 1 on) -> the rows of its dL/dY over the batches, which have attention masks.

    The model's parameters must require gradients, and have none afterwards.
    """
    counts = {(kind, number + 1): RowCounts() for kind, names in layers.items() for number in range(len(names))}
    is_text = torch.empty(0)

    def hook(key: tuple[str, int]) -> Callable[[nn.Module, object, Tensor], None]:
        def count(dy: Tensor) -> None:
            counts[key].add(dy.flatten(0, -2), is_text)

        def watch(module: nn.Module, inputs: object, output: Tensor) -> None:
            output.register_hook(count)

        return watch

    hooks = [
        model.get_submodule(name).register_forward_hook(hook((kind, number)))
        for kind, names in layers.items()
        for number, name in enumerate(names, start=1)
    ]
    try:
        for batch in batches:
            is_text = batch["attention_mask"].bool().flatten()
            backward(model, batch)
            model.zero_grad(set_to_none=True)
    finally:
        for each in hooks:
            each.remove()
    return counts


def _padded_to(length: int, batch: Mapping[str, Tensor], pad_token: int) -> dict[str, Tensor]:
    """The batch with as much padding as makes its texts `length` tokens long."""
    more = length - batch["input_ids"].shape[1]
    if more < 0:
        raise InputError(f"texts of {batch['input_ids'].shape[1]} tokens cannot be padded to {length}")

    def widened(name: str, tensor: Tensor) -> Tensor:
        if name == "labels":
            return tensor
        return nn.functional.pad(tensor, (0, more), value=pad_token if name == "input_ids" else 0)

    return {name: widened(name, tensor) for name, tensor in batch.items()}


def _rounded(share: float) -> float:
    """Four significant digits."""
    return float(f"{share:.4g}")


# --- the command


def space_command(arguments: argparse.Namespace) -> None:
    """Measure, and write `space.json` and two CSV files into `--out`."""
    check_destination(arguments.json)
    if reason := unwritable(arguments.out / FILE):
        raise InputError(f"--out {arguments.out} cannot be written: {reason}")
    names = ("model", "train_size", "epochs", "train_rest", "hub", *(["tasks"] if arguments.tasks else []))
    found = measure(Settings(**{name: getattr(arguments, name) for name in names}), say)
    text = dumps(found)
    for name, content in csv_files(found).items():
        write_bytes(content.encode(), arguments.out / name)
    write_bytes(text.encode(), arguments.out / FILE)
    if arguments.json == "-":
        sys.stdout.write(text)
    else:
        write_bytes(text.encode(), arguments.json)


def dumps(found: Mapping[str, object]) -> str:
    """JSON with a line for each row."""
    parts = []
    for name, value in found.items():
        if name in ("energy", "zero_rows"):
            rows = ",\n".join(json.dumps(row, allow_nan=False, separators=(",", ":")) for row in value)
            parts.append(f' "{name}": [\n{rows}\n]')
        else:
            parts.append(f' "{name}": {json.dumps(value, allow_nan=False)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def csv_files(found: Mapping[str, object]) -> dict[str, str]:
    """File name -> the rows as CSV; shares kept have a column for each density."""
    names = [f"top_{100 * density:g}_pct" for density in found["densities"]]
    energy = [
        {name: value for name, value in row.items() if name != "kept"} | dict(zip(names, row["kept"], strict=True))
        for row in found["energy"]
    ]
    return {"space-energy.csv": table(energy), "space-zero-rows.csv": table(found["zero_rows"])}
