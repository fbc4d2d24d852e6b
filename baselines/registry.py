"""Methods by name: every concrete `Method` in this package, found by looking, so that a new file is all it takes."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import baselines
from baselines.method import Budget, Method, MethodError

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
    if name not in known:
        raise MethodError(f"unknown method {name!r}; the registry has: {', '.join(known)}")
    return known[name]


def parse(text: str) -> list[tuple[str, Budget]]:
    """`full,lora[7],sparsegrad[0.01]` -> [("full", None), ("lora", 7), ("sparsegrad", 0.01)]; `all` is every method.

    A number with a point or an exponent is a density, an integer is a count, AxB is kept as text. Raises `MethodError`.
    """
    if text.strip() == "all":
        return [(name, None) for name in methods()]
    result = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*([A-Za-z0-9:_-]+)\s*(?:\[\s*([^\[\]\s]+)\s*\])?\s*", item)
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
