"""Methods by name: every concrete `Method` in this package, found by looking, so that a new file is all it takes.

Two kinds of names lead elsewhere, and are not among `methods()`: `peft:NAME` to a tuner of peft's, and `FILE.py:CLASS`
to a class in a file of the user's own.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

import baselines
from baselines.method import Budget, Method, MethodError
from baselines.peft_tuner import is_peft, tuner_method

# The order in which tables list them; methods not named here follow by name.
CORE = (
    "full",
    "head",
    "lora",
    "meprop-example",
    "meprop-unified",
    "meprop-weight",
    "random-mask",
    "sparsegrad",
    "sparsegrad-folded",
    "sparsegrad-compact",
    "sparsegrad-fixed",
    "sparsegrad-core",
    "sparsegrad-directions",
)
_IN_A_FILE = re.compile(r"(.+\.py):(\w+)")
LONGEST_BUDGET = 40  # characters of a count or a core


@cache
def methods() -> Mapping[str, type[Method]]:
    """Registry name -> class."""
    found: dict[str, type[Method]] = {}
    for info in pkgutil.iter_modules(baselines.__path__):
        module = importlib.import_module(f"baselines.{info.name}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            # Its own classes only; Python 3.10 also takes aliases such as tuple[int, int] for classes.
            if cls.__module__ == module.__name__ and issubclass(cls, Method) and not inspect.isabstract(cls):
                if cls.name in found:
                    raise MethodError(
                        f"two classes are named {cls.name!r}: {found[cls.name].__name__} and {cls.__name__}"
                    )
                found[cls.name] = cls
    rank = {name: i for i, name in enumerate(CORE)}
    return MappingProxyType({name: found[name] for name in sorted(found, key=lambda n: (rank.get(n, len(rank)), n))})


def get(name: str) -> type[Method]:
    """The class of a method; an unknown name raises `MethodError` with the known ones."""
    known = methods()
    if name in known:
        return known[name]
    if is_peft(name):
        return tuner_method(name)
    if match := _IN_A_FILE.fullmatch(name):
        return from_file(match[1], match[2])
    raise MethodError(
        f"unknown method {name!r}; the registry has: {', '.join(known)}, and peft:NAME and FILE.py:CLASS name others"
    )


def may_be(name: str) -> bool:
    """Whether a name can be a method's, told without running a file or importing peft."""
    return name in methods() or is_peft(name) or _IN_A_FILE.fullmatch(name) is not None


@cache
def from_file(path: str, name: str) -> type[Method]:
    """The method that the class `name` in a file is; its own name becomes PATH:CLASS, by which any process finds it.

    The file is run as Python runs a module. Raises `MethodError`.
    """
    if not Path(path).is_file():
        raise MethodError(f"there is no file {path}: give FILE.py:CLASS, from the current directory or absolute")
    spec = importlib.util.spec_from_file_location(f"method_of_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    # Where a dataclass, say, looks up what a class's annotations name.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise MethodError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    cls = getattr(module, name, None)
    if not (inspect.isclass(cls) and issubclass(cls, Method)):
        raise MethodError(f"{path} has no class {name} that derives from baselines.method.Method")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise MethodError(f"{name} in {path} is not complete: it lacks {missing}")
    cls.name = f"{path}:{name}"
    return cls


def parse(text: str) -> list[tuple[str, Budget]]:
    """`full,lora[7],sparsegrad[0.01]` -> [("full", None), ("lora", 7), ("sparsegrad", 0.01)]; `all` is every method.

    A number with a point or an exponent is a density, an integer is a count, AxB is kept as text. Raises `MethodError`.
    """
    result: list[tuple[str, Budget]] = []
    for item in text.split(","):
        if item.strip() == "all":
            result += [(name, None) for name in methods()]
            continue
        match = re.fullmatch(r"\s*([^\s,\[\]]+)\s*(?:\[\s*([^\[\]\s]+)\s*\])?\s*", item)
        if not match:
            raise MethodError(
                f"cannot read the method {item.strip()!r}; write name or name[budget], separated by commas"
            )
        name, budget = match[1], match[2]
        get(name)
        result.append((name, None if budget is None else parse_budget(budget)))
    return result


def parse_budget(text: str) -> int | float | str:
    """An integer, a float or AxB. Raises `MethodError`."""
    if re.fullmatch(r"[+-]?\d+|\d+x\d+", text):
        if len(text) > LONGEST_BUDGET:
            raise MethodError(f"the budget {text[:LONGEST_BUDGET]}... has more digits than a layer can have entries")
        return text if "x" in text else int(text)
    try:
        return float(text)
    except ValueError:
        raise MethodError(
            f"cannot read the budget {text!r}; give a count (7), a density (0.01) or a core (82x326)"
        ) from None
