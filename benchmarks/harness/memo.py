"""What operations return of fake tensors, remembered: a model repeats its layers, and a method its steps.

FakeTensorMode keeps such a memory of its own, which takes several times as long to ask: it describes each tensor in
full. Here the operations whose results follow from shapes, strides, offsets and dtypes alone are asked once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch

# What may stand in a key as it is, beside tensors; numbers stand with their type, which decides the result's dtype.
_PLAIN = (torch.dtype, torch.device, torch.layout, torch.memory_format, str, type(None))
_NUMBERS = (bool, int, float)
# Their results are more than their arguments' metadata and their own say.
_TELLING_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}


class _Unknown(Exception):
    """An argument or a result that cannot be described."""


class _Given(NamedTuple):
    """The result is a tensor that was given."""

    index: int


class _View(NamedTuple):
    """The result is a view of a tensor that was given."""

    index: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Fresh(NamedTuple):
    """The result has a storage of its own."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Recipe(NamedTuple):
    """How to make the results of an operation again."""

    mode: FakeTensorMode | None
    kind: type | None  # tuple or list, or None where the result is one tensor; NoneType where there is none
    results: list[_Given | _View | _Fresh]


class Memo:
    """Runs operations, or makes their results where the same was asked before."""

    def __init__(self):
        self._recipes: dict[Hashable, _Recipe | None] = {}
        self._plain: dict[Callable, bool] = {}  # operation -> whether its results follow from its arguments' metadata

    def __call__(self, func: Callable, args: Sequence, kwargs: dict) -> object:
        """What `func(*args, **kwargs)` returns, for fake CPU tensors and what else an operation takes."""
        plain = self._plain.get(func)
        if plain is None:
            plain = self._plain[func] = func.namespace == "aten" and _TELLING_TAGS.isdisjoint(func.tags)
        if not plain:
            return func(*args, **kwargs)
        given: list[Tensor] = []
        key: list[Hashable] = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
        try:
            _describe(args, key, given)
            if kwargs:
                for name, value in kwargs.items():
                    key.append(name)
                    _describe(value, key, given)
        except _Unknown:
            return func(*args, **kwargs)
        key = tuple(key)
        if key not in self._recipes:
            before = _states(given)
            result = func(*args, **kwargs)
            # What an operation does to its arguments' metadata or storages is not repeated by a recipe.
            self._recipes[key] = _recipe(result, given) if _states(given) == before else None
            return result
        recipe = self._recipes[key]
        return func(*args, **kwargs) if recipe is None else _made(recipe, given)


def _describe(thing: object, key: list, given: list[Tensor]) -> None:
    """Append what an operation can know of an argument to `key`, and its tensors to `given`."""
    if isinstance(thing, FakeTensor):
        dtype = thing.dtype
        # The conjugate and negative bits that a complex tensor may have, and constants, are more than metadata.
        if thing.layout != torch.strided or dtype.is_complex or thing.constant is not None:
            raise _Unknown
        given.append(thing)
        key += (thing.shape, thing.stride(), thing.storage_offset(), dtype)
    elif isinstance(thing, _NUMBERS):
        key += (type(thing), thing)
    elif isinstance(thing, _PLAIN):
        key.append(thing)
    elif isinstance(thing, tuple | list):
        key.append(len(thing))
        for part in thing:
            _describe(part, key, given)
    else:
        raise _Unknown


def _states(given: Sequence[Tensor]) -> list[tuple]:
    states = []
    for tensor in given:
        storage = tensor.untyped_storage()
        states.append((tensor.shape, tensor.stride(), tensor.storage_offset(), storage._cdata, storage.nbytes()))
    return states


def _recipe(result: object, given: Sequence[Tensor]) -> _Recipe | None:
    """The recipe of an operation's result; None where it is not one of tensors that can be made again."""
    if result is None:
        return _Recipe(None, type(None), [])
    kind = type(result) if type(result) in (tuple, list) else None
    results = [result] if kind is None else result
    if not results or not all(isinstance(each, FakeTensor) and each.layout == torch.strided for each in results):
        return None
    own = [each.untyped_storage()._cdata for each in results]
    recipes = [
        _of_one(each, given) if own.count(address) == 1 or _index(each, given) is not None else None
        for each, address in zip(results, own, strict=True)
    ]
    return None if None in recipes else _Recipe(results[0].fake_mode, kind, recipes)


def _index(result: FakeTensor, given: Sequence[Tensor]) -> int | None:
    """Which given tensor's storage the result has."""
    address = result.untyped_storage()._cdata
    return next((i for i, each in enumerate(given) if each.untyped_storage()._cdata == address), None)


def _of_one(result: FakeTensor, given: Sequence[Tensor]) -> _Given | _View | _Fresh | None:
    # By identity: tensors compare by their entries.
    same = next((i for i, each in enumerate(given) if each is result), None)
    if same is not None:
        return _Given(same)
    if (
        result.dtype.is_complex
        or result.constant is not None
        or result.fake_device.type != "cpu"
        or result.requires_grad
    ):
        return None
    shape, stride, offset = tuple(result.shape), result.stride(), result.storage_offset()
    of = _index(result, given)
    if of is not None:
        return _View(of, shape, stride, offset) if given[of].dtype == result.dtype else None
    with no_dispatch():
        again = torch.empty_strided(shape, stride, dtype=result.dtype, device="meta")
    as_large = again.untyped_storage().nbytes() == result.untyped_storage().nbytes()
    return _Fresh(shape, stride, result.dtype) if as_large and offset == 0 else None


_CPU = torch.device("cpu")


def _made(recipe: _Recipe, given: Sequence[Tensor]) -> object:
    if recipe.kind is type(None):
        return None
    results = []
    for how in recipe.results:
        if type(how) is _Given:
            results.append(given[how.index])
            continue
        with no_dispatch():
            if type(how) is _View:
                plain = torch.as_strided(given[how.index], how.shape, how.stride, how.offset)
            else:
                plain = torch.empty_strided(how.shape, how.stride, dtype=how.dtype, device="meta")
        results.append(FakeTensor(recipe.mode, plain, _CPU))
    return results[0] if recipe.kind is None else recipe.kind(results)
