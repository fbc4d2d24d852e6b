"""Fake tensors: models and batches that have shapes, dtypes and storages, but no memory behind them.

A model is made on `meta` and fake CPU tensors are laid in place of its parameters and buffers. Operations then run
under torch's FakeTensorMode, which knows what each returns. What it does not know are values; `KnownValues` keeps
those that follow from what a workload and a seed say (tokens, masks, positions, counters), and answers questions about
them. A question about any other value is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import UnsupportedFakeTensorException
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks.harness.memo import Memo
from benchmarks.harness.memory import tensors_of

# Values of larger tensors are not kept. The supports of `random-mask` are drawn as permutations of whole weights: up to
# this size (1024 x 4096) they are the ones that a run draws.
MOST_KNOWN = 2**22


def lay_fakes(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Put a fake CPU tensor in place of each parameter and buffer of a model on meta; returns the model.

    What was shared stays so: a tied parameter is one, views of a storage are views of one.
    """
    laid: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in laid:
            # It takes over the meta tensor's storage.
            copy = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
            is_parameter = isinstance(tensor, nn.Parameter)
            laid[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
        return laid[id(tensor)]

    # Held until the end, or the address of one that is gone could be taken for another's.
    originals = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            own.update({name: fake(tensor) for name, tensor in own.items() if tensor is not None})
    del originals
    return model


@contextmanager
def not_traced() -> Iterator[None]:
    """Keep transformers from taking fake tensors for a trace, in which it builds masks that a run does without."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("transformers.") and "is_tracing" in vars(module):
                # Not a Mock: it would remember its arguments, and keep them alive.
                stack.enter_context(mock.patch.object(module, "is_tracing", _no))
        yield


def _no(*_: object) -> bool:
    return False


@contextmanager
def moved_in_place() -> Iterator[None]:
    """Let `module.to(...)` pass that changes nothing, as libraries call it.

    On real tensors it sets what is there; fake ones are exchanged, which torch refuses where somebody watches them.
    """
    swap = torch.utils.swap_tensors

    def exchange(one: Tensor, other: Tensor) -> None:
        if one.dtype != other.dtype or one.untyped_storage()._cdata != other.untyped_storage()._cdata:
            swap(one, other)

    with mock.patch.object(torch.utils, "swap_tensors", exchange):
        yield


def value_of(tensor: Tensor) -> Tensor | None:
    """The real tensor that a fake one stands for, where it is known; a real tensor is its own."""
    if not isinstance(tensor, FakeTensor):
        return tensor
    known = getattr(tensor, "known_value", None)
    return None if known is None or getattr(known.untyped_storage(), "overwritten", False) else known


def _clone_coo(tensor: Tensor, **_: object) -> Tensor:
    """What `clone` gives of a COO tensor; torch's fake one has no entries."""
    return _coo(tensor, tensor.is_coalesced())


def _coalesce_coo(tensor: Tensor) -> Tensor:
    """What the CPU's `_coalesce` gives of a COO tensor whose entries are known to be distinct."""
    if not getattr(tensor._indices().untyped_storage(), "distinct", False):
        raise UnsupportedFakeTensorException("how many entries of a COO tensor are distinct depends on its indices")
    return _coo(tensor, True)


def _coo(tensor: Tensor, is_coalesced: bool) -> Tensor:
    indices, values = torch.empty_like(tensor._indices()), torch.empty_like(tensor._values())
    return torch.sparse_coo_tensor(indices, values, tensor.shape, is_coalesced=is_coalesced, check_invariants=False)


# Both take indices, then values.
MAKE_COO = (
    torch.ops.aten.sparse_coo_tensor.indices_size,
    torch.ops.aten._sparse_coo_tensor_with_dims_and_tensors.default,
)
COO_COPIES = {torch.ops.aten.clone.default: _clone_coo, torch.ops.aten._coalesce.default: _coalesce_coo}
# Operations whose sparse results are right.
COO_KNOWN = (*MAKE_COO, torch.ops.aten.detach.default, torch.ops.aten.alias.default, *COO_COPIES)


class KnownValues(TorchDispatchMode):
    """Computes the values of small fake tensors as far as they follow from values that are known.

    Known are real tensors that enter (a tokenizer's), constants (`arange`, `zeros`), integers drawn with a generator of
    their own, and what operations make of them. To be entered after FakeTensorMode.
    """

    def __init__(self):
        super().__init__()
        self._run = Memo()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation; keep the values of its results where its arguments' are known."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        given = list(tensors_of((args, kwargs)))
        known = all(value_of(tensor) is not None for tensor in given)
        if torch.Tag.data_dependent_output in func.tags:
            return self._real(func, args, kwargs) if known else self.value_unknown(func, args, kwargs)
        if torch.Tag.dynamic_output_shape in func.tags:
            if not known:
                return self.shape_unknown(func, args, kwargs)
            real = self._real(func, args, kwargs)
            result = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype)
            result.known_value = real
            return result
        is_coo_copy = func in COO_COPIES and given[0].layout == torch.sparse_coo
        result = COO_COPIES[func](*args, **kwargs) if is_coo_copy else self._run(func, args, kwargs)
        results = list(tensors_of(result))
        if func in MAKE_COO and kwargs.get("is_coalesced"):
            given[0].untyped_storage().distinct = True  # no two entries at one index
        elif any(leaf.layout != torch.strided for leaf in results) and func not in COO_KNOWN:
            raise UnsupportedFakeTensorException(f"{func} gives a sparse tensor, whose entries cannot be counted")
        mutable = func._schema.is_mutable
        if known and (results or mutable) and self._determined(func, kwargs, results):
            for fake, real in zip(results, tensors_of(self._real(func, args, kwargs)), strict=True):
                fake.known_value = real
        elif mutable:
            self._forget(func, args, kwargs)
        self.done(func, args, result)
        return result

    def done(self, func, args, result) -> None:
        """Called when an operation has run."""

    def value_unknown(self, func, args, kwargs):
        """A question about values that are not known: torch's error, by default."""
        return func(*args, **kwargs)

    def shape_unknown(self, func, args, kwargs):
        """An operation whose result's shape depends on values that are not known: torch's error, by default."""
        return func(*args, **kwargs)

    def _determined(self, func, kwargs, results: list[FakeTensor]) -> bool:
        if any(fake.numel() > MOST_KNOWN or fake.layout != torch.strided for fake in results):
            return False
        if torch.Tag.nondeterministic_seeded in func.tags:
            # The generator of its own is drawn from once here, as in a run.
            drawn = all(not fake.dtype.is_floating_point for fake in results)
            return drawn and kwargs.get("generator") is not None
        return "empty" not in func._schema.name

    @staticmethod
    def _real(func, args, kwargs):
        args, kwargs = tree_map_only(FakeTensor, value_of, (args, kwargs))
        with no_dispatch():
            return func(*args, **kwargs)

    @staticmethod
    def _forget(func, args, kwargs) -> None:
        """What is written to is no longer known, nor are views of it."""
        positional = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors_of({**positional, **kwargs}.get(argument.name)):
                    known = getattr(tensor, "known_value", None)
                    if known is not None:
                        known.untyped_storage().overwritten = True
