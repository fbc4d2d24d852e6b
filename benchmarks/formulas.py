"""The table in docs/methods.md: `python -m benchmarks.formulas`, written to standard output.

Each method's `formula` says in words and in bytes what it claims to hold for one linear layer; a test holds the bytes
against those of real steps (tests/baselines/test_method.py), and another this table against the file.
"""

from __future__ import annotations

import inspect

import torch

from baselines.method import Method, Setting
from baselines.registry import get, methods
from benchmarks.harness.budget import equal_trainable

SHAPE, TOKENS, DTYPE, REFERENCE = (3072, 768), 2048, torch.float32, 7

TEXT = f"""# What each method stores for one layer

A layer of BERT-base's MLP, {SHAPE[1]} to {SHAPE[0]}, in float32, {TOKENS:,} tokens (16 x 128); budgets are the nearest
to LoRA's rank {REFERENCE} in parameters. Sizes in MiB, of the layer without its bias (but for `bitfit`, which trains
it), in a steady-state step: parameters include the weight W ({{weight}}); a basis is shared by the layers of a kind;
beyond X, which the layer before may keep too, *saved* is what lives from forward to backward. What is short-lived, a
dense gradient that is thrown away for one, is in no formula: the peaks that a run measures or `predict` predicts have
it.

Made by `python -m benchmarks.formulas` from the methods' own `formula`, which a test holds against the bytes of real
steps to the byte. `peft:NAME` and methods of your own say theirs as well. Equal parameters do not suit every method:
two vectors of VeRA have as many as LoRA's matrices only at a rank that nobody would choose.

| method | stores | parameters | gradient | optimizer | basis | saved | keeps X |
|---|---|--:|--:|--:|--:|--:|---|
"""


def row(cls: type[Method]) -> str:
    """The line of one method."""
    budget = None
    if cls.knob is not None:
        reference = get("lora")(REFERENCE, _setting()).budget_params([SHAPE])
        budget = equal_trainable(cls.name, reference, [SHAPE])
    method = cls(budget, _setting())
    claim = method.formula(SHAPE, TOKENS, DTYPE)
    name = f"`{cls.name}`" if budget is None else f"`{cls.name}[{budget}]`"
    words = " ".join(inspect.getdoc(cls.formula).split()).replace("|", "\\|")
    sizes = (claim.parameter, claim.gradient, claim.optimizer, claim.basis, claim.activation)
    kept = "yes" if claim.keeps_input else "no"
    return f"| {name} | {words} | {' | '.join(map(mib, sizes))} | {kept} |"


def mib(size: int) -> str:
    """A size in MiB; 0 is 0 and not a rounded something."""
    return "0" if not size else f"{size / 2**20:.3f}"


def text() -> str:
    """The whole page."""
    weight = mib(SHAPE[0] * SHAPE[1] * DTYPE.itemsize)
    return TEXT.format(weight=weight) + "\n".join(map(row, methods().values())) + "\n"


def _setting() -> Setting:
    return Setting({"up": ["layer"]})


if __name__ == "__main__":
    print(text(), end="")
