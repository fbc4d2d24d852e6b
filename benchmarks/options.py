"""What the words of the command line mean: values and lists of them, and the fields of a spec that they fill."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterator
from itertools import product

from reports.reading import shown

# The options that `predict` takes several values of, in the order in which it goes through them: the first is the
# slowest to change.
SWEPT = ("model", "layer", "block", "batch", "seq", "dtype", "attention", "optimizer", "optimizer_impl", "gpu")
MOST_CALIBRATION_STEPS = 10_000


def several(read: Callable[[str], object]) -> Callable[[str], tuple]:
    """An argparse type: values separated by commas, each as `read` reads it."""

    def values(text: str) -> tuple:
        return tuple(read(part.strip()) for part in text.split(","))

    return values


def checkpoints(text: str) -> tuple[str, ...]:
    """An argparse type: names or paths of models; a path that exists may have commas in it."""
    return (text,) if os.path.exists(text) else several(str)(text)


def integer(text: str) -> int:
    """A whole number."""
    if not re.fullmatch(r"[+-]?\d{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def shape(text: str) -> tuple[int, int]:
    """D_INxD_OUT, neither of them 0."""
    match = re.fullmatch(r"(\d{1,18})x(\d{1,18})", text)
    if not match or not all(int(n) for n in match.groups()):
        raise argparse.ArgumentTypeError(f"write a shape as D_INxD_OUT, for example 768x3072, got {text!r}")
    return int(match[1]), int(match[2])


def memory(text: str) -> int:
    """A size in GiB or MiB, as bytes."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(GiB|MiB)", text)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"write a size in GiB or MiB, for example 24GiB, got {text!r}")
    return int(float(match[1]) * 2 ** (30 if match[2] == "GiB" else 20))


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def combinations(arguments: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """The arguments with one value for each option of `SWEPT`: every combination, in a fixed order.

    Raises `InputError` for a value that is given twice.
    """
    from benchmarks.harness.errors import InputError

    swept = [option for option in SWEPT if hasattr(arguments, option)]
    for option in swept:
        values = getattr(arguments, option)
        if len(set(values)) < len(values):
            twice = next(value for value in values if values.count(value) > 1)
            raise InputError(f"{_flag(option)} has {_written(twice)} twice: give each value once")
    for values in product(*(getattr(arguments, option) for option in swept)):
        yield argparse.Namespace(**{**vars(arguments), **dict(zip(swept, values, strict=True))})


def single(arguments: argparse.Namespace) -> argparse.Namespace:
    """The one combination of a command that takes no lists. Raises `InputError` where there are more."""
    from benchmarks.harness.errors import InputError

    for option in SWEPT:
        values = getattr(arguments, option, ())
        if len(values) > 1:
            given = ",".join(map(_written, values))
            raise InputError(
                f"{arguments.command} takes one value of {_flag(option)}, got {given}; predict takes several"
            )
    return next(combinations(arguments))


def fields(arguments: argparse.Namespace, device: str, **fixed: object) -> dict[str, object]:
    """The fields of a `RunSpec` that one combination of arguments gives, checked one by one. Raises `InputError`."""
    from baselines.method import OPTIMIZER_IMPLS, OPTIMIZERS
    from benchmarks.harness.errors import InputError
    from benchmarks.harness.models import ATTENTIONS
    from benchmarks.harness.spec import RunSpec

    for option, most in (("calibration_steps", MOST_CALIBRATION_STEPS), ("lr", sys.float_info.max)):
        value = getattr(arguments, option)
        if not 0 < value <= most:
            raise InputError(f"{_flag(option)} must be positive, and at most {most:g}, got {shown(value)}")
    if not 0 <= arguments.seed < 2**32:
        raise InputError(f"--seed must be from 0 to {2**32 - 1}, got {shown(arguments.seed)}")
    # torch's own choice: foreach on CUDA, a loop over the parameters elsewhere; of AdamW8bit there is one form.
    impl = "foreach" if device == "cuda" and arguments.optimizer != "adamw8bit" else "for-loop"
    if arguments.optimizer_impl is not None:
        impl = arguments.optimizer_impl
    for option, value, known in (
        ("attention", arguments.attention, ATTENTIONS),
        ("optimizer", arguments.optimizer, OPTIMIZERS),
        ("optimizer_impl", impl, OPTIMIZER_IMPLS),
    ):
        if value not in known:
            raise InputError(f"{_flag(option)} must be one of {', '.join(known)}, got {value!r}")
    if arguments.optimizer == "adamw8bit" and impl != "for-loop":
        raise InputError(f"--optimizer-impl {impl} is for adamw and sgd: leave it out with --optimizer adamw8bit")
    names = {f.name for f in dataclasses.fields(RunSpec)} - {"equal_trainable"}
    given = {option: value for option, value in vars(arguments).items() if option in names}
    return {**given, "optimizer_impl": impl, "device": device, **fixed}


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _written(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
