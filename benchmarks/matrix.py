"""The cases of the suite: which methods on which layers, blocks and models."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import pytest

from baselines.registry import CORE

# The method that sets every other one's budget, as in the paper's comparison on RoBERTa-base.
EQUAL_TRAINABLE = "lora[7]"
METHODS = CORE
# The MLPs of BERT-small and MiniLM, of the base models and of the large ones; LLaMA-2-7B's is beyond most machines.
SIZES = ("384x1536", "768x3072", "1024x4096", "4096x11008")
LARGE = ("4096x11008",)
TOKENS = (512, 2048)
DTYPES = ("float32", "bfloat16")
# Rounds that are timed: more where steps are so short that the time over which rounds are spread has room for more.
ROUNDS = 15
MORE_ROUNDS = {("384x1536", 512): 45, ("768x3072", 512): 25}
# Sequences in a batch of T tokens: what tells an example from a minibatch.
SHAPE_BATCH = 4
# Their gradients are random, so there is no basis to find: these are as many as give the Gram matrices full rank at
# T = 512; more would cost hours over the matrix and change nothing but the preparation's time.
SHAPE_CALIBRATION_STEPS = 5
# Neither bytes nor step times depend on the basis being a good one, and preparations are made twice, timed and tracked.
MODEL_CALIBRATION_STEPS = 10

# Models: batch and tokens per example. The text is short questions for the encoder, running text for the decoder.
MODELS = {"minilm-l6": (16, 64), "smollm2-135m": (2, 128)}
REGIMES = ("all", "none")

# About twenty runs in a few minutes: the encoder in the paper's regime, and how memory grows with the size of a block,
# for the methods that the paper compares and the forms of SparseGrad that need less memory.
QUICK_MODELS = ("minilm-l6",)
QUICK_REGIMES = ("all",)
QUICK_MODEL_METHODS = (
    "full",
    "head",
    "lora",
    "meprop-weight",
    "random-mask",
    "sparsegrad",
    "sparsegrad-folded",
    "sparsegrad-directions",
)
QUICK_BLOCK_METHODS = ("full", "lora", "sparsegrad", "sparsegrad-directions")
# Full bases of 4096 directions take longer than all else of their case together.
SLOW = {("1024x4096", "sparsegrad")}
QUICK_TOKENS = (512,)
QUICK_DTYPES = ("float32",)


def rounds(case: Mapping[str, object]) -> int:
    """Rounds to time on the case (its fields as the tests name them)."""
    return MORE_ROUNDS.get((case.get("layer") or case.get("block"), case.get("tokens")), ROUNDS)


def shapes(kind: str) -> list:
    """Parameters (size, tokens, dtype, method) of the layers or the blocks."""
    cases = []
    for size, tokens, dtype, method in product(SIZES, TOKENS, DTYPES, METHODS):
        quick = (
            kind == "block"
            and size not in LARGE
            and tokens in QUICK_TOKENS
            and dtype in QUICK_DTYPES
            and method in QUICK_BLOCK_METHODS
            and (size, method) not in SLOW
        )
        cases.append(pytest.param(size, tokens, dtype, method, marks=_marks(quick=quick, large=size in LARGE)))
    return cases


def models() -> list:
    """Parameters (model, train_rest, method) of the models."""
    return [
        pytest.param(model, rest, method, marks=_marks(quick=_quick_model(model, rest, method), large=False))
        for model, rest, method in product(MODELS, REGIMES, METHODS)
    ]


def _quick_model(model: str, rest: str, method: str) -> bool:
    return model in QUICK_MODELS and rest in QUICK_REGIMES and method in QUICK_MODEL_METHODS


def _marks(**applies: bool) -> list:
    return [getattr(pytest.mark, name) for name, does in applies.items() if does]
