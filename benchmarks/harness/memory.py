"""Live bytes by category and phase, storage by storage.

What is counted: every storage that a tensor seen by the dispatcher refers to, from the operation that made it until
the last reference to it is gone, in its own size (a view keeps its whole storage alive; a sparse tensor is its indices
and its values). This covers eager, foreach and fused optimizers, custom autograd functions, checkpointing and COO
gradients alike.

What is NOT counted: what a kernel allocates inside itself and frees before it returns (`kernel_workspace_bytes` says
how much that was, from the allocator's own trace), the random states that checkpointing saves (5056 bytes a block, made
and kept outside dispatch; the trace has them too), memory that is not torch's, and alignment.

Storages made outside dispatch (`from_pretrained` fills weights so) are found by `Tracker.adopt`, which walks what it is
given. The log of events is kept as it happens; peaks and categories are computed from it afterwards, when it is known
what each storage turned out to be.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.optim.optimizer import Optimizer
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# In the order of precedence: a storage that is several things counts as the first of them.
CATEGORIES = ("basis", "optimizer", "parameter", "gradient", "activation", "temporary")


# Runs an operation as the kernels of a device would: (operation, arguments, keyword arguments, what notes a storage).
Kernels = Callable[[Callable, Sequence, dict, Callable[[object], None]], object]


class Event(NamedTuple):
    """A change of live bytes."""

    storage: int  # serial number, never reused
    change: int  # bytes, negative at death
    phase: str


@dataclass
class Span:
    """A stretch of the log, from position `start` to `end`."""

    phase: str
    start: int
    end: int


@dataclass(frozen=True)
class Peak:
    """The most bytes live in a span of the log, and what they were; `phase` is None where the start was the most."""

    bytes: int
    phase: str | None
    by_category: dict[str, int]


def storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages behind a tensor: one for a strided one, indices and values for a sparse one."""
    if tensor.layout == torch.strided:
        yield tensor.untyped_storage()
    elif tensor.layout == torch.sparse_coo:
        # Looked at, not asked for by an operation, which takes long where the tensor is fake.
        with no_dispatch():
            parts = tensor._indices(), tensor._values()
        yield from (part.untyped_storage() for part in parts)
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values()):
            yield part.untyped_storage()
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        for part in (tensor.ccol_indices(), tensor.row_indices(), tensor.values()):
            yield part.untyped_storage()
    else:
        raise TypeError(f"cannot account for a tensor of layout {tensor.layout}")


def tensors_in(thing: object) -> Iterator[Tensor]:
    """Every tensor of a module (with gradients), an optimizer's state, or any nest of containers."""
    if isinstance(thing, nn.Module):
        for tensor in (*thing.parameters(), *thing.buffers()):
            yield tensor
            if tensor.grad is not None:
                yield tensor.grad
    elif isinstance(thing, Optimizer):
        yield from tensors_in([state for state in thing.state.values()])
    else:
        for leaf in tree_leaves(thing):
            if isinstance(leaf, Tensor):
                yield leaf


def tensors_of(thing: object) -> Iterator[Tensor]:
    """Every tensor among an operation's arguments or results, which are nested in nothing but lists and tuples.

    A pytree's leaves would be the same, in several times the time.
    """
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, tuple | list):
        for part in thing:
            yield from tensors_of(part)
    elif isinstance(thing, dict):
        for part in thing.values():
            yield from tensors_of(part)


# Modules whose frames torch puts between an operation and a mode's __torch_dispatch__.
_DISPATCH_WRAPPERS = ("torch._compile", "torch._dynamo.eval_frame", "torch.utils._python_dispatch")


def _called_by_autograd() -> bool:
    """Whether the operation being dispatched was called by autograd's engine itself, not by Python code under it."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") in _DISPATCH_WRAPPERS:
        frame = frame.f_back
    return frame is None or frame.f_code.co_name == "_engine_run_backward"


def _taken_over(gradient: Tensor) -> Tensor:
    """What autograd stores as `.grad` of a COO gradient that nobody else holds: its own indices and values.

    Under any dispatch mode autograd finds those shared, since the mode had to be shown them, and clones the gradient
    instead. What is watched would then not be what runs unwatched, by the bytes of a gradient.
    """
    return torch.sparse_coo_tensor(
        gradient._indices(), gradient._values(), gradient.shape, is_coalesced=False, check_invariants=False
    )


class _Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


@cache
def _dispatch_once() -> None:
    """Let torch import what it imports at a process's first dispatch to a mode.

    Exceptions that are caught and kept in there hold the frames of whoever came first, and its tensors.
    """
    with _Passing():
        torch.empty(0)


class Tracker(TorchDispatchMode):
    """Logs the birth and death of storages while it is entered as a context.

    Only storages on `device_type` count; with `fake`, those of fake tensors alone, which have a size and no memory.

    >>> with Tracker() as tracker, tracker.phase("forward"):
    ...     y = model(x)
    >>> tracker.peak(0).bytes
    """

    def __init__(self, device_type: str = "cpu", fake: bool = False, kernels: Kernels | None = None):
        super().__init__()
        _dispatch_once()
        self.device_type = device_type
        self.fake = fake
        self.kernels = kernels
        self.events: list[Event] = []
        self.live_bytes = 0
        self._phase = "idle"
        self._live: dict[int, tuple[int, weakref.ref]] = {}  # address of the StorageImpl -> serial, reference
        self._size: dict[int, int] = {}  # serial -> bytes, live ones only
        self._category: dict[int, str] = {}  # serial -> category, for those that are not temporary
        self._next = 0

    # --- recording

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation, then note the storages that it returned and the arguments not seen before."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            # A fake tensor is asked for its device, oftener than for anything else.
            return args[0].fake_device if self.fake else func(*args, **kwargs)
        for tensor in tensors_of((args, kwargs)):
            self._see(tensor)
        if func is torch.ops.aten.clone.default and args[0].layout == torch.sparse_coo and _called_by_autograd():
            result = _taken_over(args[0])
        elif self.kernels is None:
            result = func(*args, **kwargs)
        else:
            result = self.kernels(func, args, kwargs, self.see)
        self.see(result)
        return result

    def see(self, thing: object) -> None:
        """Log the storages of an operation's results, or of what its kernel makes."""
        for tensor in tensors_of(thing):
            self._see(tensor)

    def adopt(self, *things: object) -> None:
        """Log storages of modules, optimizers or containers that were made outside dispatch; known ones stay known."""
        for thing in things:
            for tensor in tensors_in(thing):
                self._see(tensor)

    def _see(self, tensor: Tensor) -> None:
        if isinstance(tensor, FakeTensor) != self.fake:
            return
        # Not the storage's device, which is meta where the tensor is fake.
        device = tensor.fake_device if self.fake else tensor.device
        if device.type != self.device_type:
            return
        for storage in storages(tensor):
            address = storage._cdata
            known = self._live.get(address)
            if known is None:
                if not getattr(storage, "on_host", False):
                    self._born(storage, address)
            elif self._size[known[0]] != storage.nbytes():
                # resize_ and out= change a storage in place.
                self._log(known[0], storage.nbytes() - self._size[known[0]])
                self._size[known[0]] = storage.nbytes()

    def _born(self, storage: torch.UntypedStorage, address: int) -> None:
        serial = self._next
        self._next += 1
        # The reference must not keep the tracker's events alive through a cycle, nor outlive the storage's address.
        reference = weakref.ref(storage, lambda _: self._died(serial, address))
        self._live[address] = (serial, reference)
        self._size[serial] = storage.nbytes()
        self._log(serial, storage.nbytes())

    def _died(self, serial: int, address: int) -> None:
        if self._live.get(address, (None,))[0] == serial:
            del self._live[address]
        self._log(serial, -self._size.pop(serial))

    def _log(self, serial: int, change: int) -> None:
        self.live_bytes += change
        self.events.append(Event(serial, change, self._phase))

    @contextmanager
    def phase(self, name: str) -> Iterator[Span]:
        """Events inside belong to the phase `name`; the span is complete when the context ends."""
        before, self._phase = self._phase, name
        span = Span(name, len(self.events), len(self.events))
        try:
            yield span
        finally:
            span.end = len(self.events)
            self._phase = before

    def mark(self, category: str, *things: object) -> None:
        """Say what the storages of these things are, from their birth on; an earlier category in precedence wins."""
        rank = CATEGORIES.index(category)
        self.adopt(*things)
        for thing in things:
            for tensor in tensors_in(thing):
                for storage in storages(tensor):
                    if storage._cdata in self._live:
                        self._mark(self._live[storage._cdata][0], category, rank)

    def mark_born_since(self, category: str, position: int) -> None:
        """Mark every storage that is live now and was born at or after `position` in the log."""
        rank = CATEGORIES.index(category)
        for serial in {event.storage for event in self.events[position:] if event.change > 0}:
            if serial in self._size:
                self._mark(serial, category, rank)

    def _mark(self, serial: int, category: str, rank: int) -> None:
        if rank < CATEGORIES.index(self._category.get(serial, "temporary")):
            self._category[serial] = category

    def order_deaths(self) -> None:
        """Let storages that die one after another, with no birth between, die in the order of their births.

        Autocast empties its cache by the addresses of weights, which no two runs have in common. What dies while no
        phase is named stays: spans may end there.
        """
        ordered: list[Event] = []
        for (phase, dies), stretch in groupby(self.events, key=lambda event: (event.phase, event.change < 0)):
            events = list(stretch)
            ordered += sorted(events, key=lambda event: event.storage) if dies and phase != "idle" else events
        self.events = ordered

    # --- reading

    @property
    def position(self) -> int:
        """Where the log ends now; spans of the log are given by such positions."""
        return len(self.events)

    def serials(self, thing: object) -> set[int]:
        """The log's numbers of the storages of a thing, as far as they are known and live."""
        addresses = {s._cdata for tensor in tensors_in(thing) for s in storages(tensor)}
        return {self._live[address][0] for address in addresses if address in self._live}

    def live_at(self, position: int, without: Container[int] = ()) -> int:
        """Bytes live at a position of the log, without those of the numbered storages."""
        return sum(event.change for event in self.events[:position] if event.storage not in without)

    def peak(self, start: int, end: int | None = None) -> Peak:
        """The most bytes live from position `start`, what was live there included, to position `end`.

        The breakdown is that of the first instant at which the most was live; it adds up to `bytes` exactly.
        """
        total = most = sum(event.change for event in self.events[:start])
        at, where = start, None
        for i, event in enumerate(self.events[start:end], start + 1):
            total += event.change
            if total > most:
                most, at, where = total, i, event.phase
        sizes: dict[int, int] = {}
        for event in self.events[:at]:
            sizes[event.storage] = sizes.get(event.storage, 0) + event.change
        by_category = dict.fromkeys(CATEGORIES, 0)
        for serial, n in sizes.items():
            by_category[self._category.get(serial, "temporary")] += n
        return Peak(most, where, by_category)

    def series(self, start: int, end: int, most: int) -> tuple[list[int], dict[str, list[int]]]:
        """Live bytes by category from position `start` to `end`, at `most` instants or fewer.

        An instant is the number of events since `start`. A longer log is cut into stretches of equal length, and of
        each the instants of its least and its most live bytes are kept, so that no extreme is lost. `most` >= 4.
        """
        sizes = dict.fromkeys(CATEGORIES, 0)
        for event in self.events[:start]:
            sizes[self._category.get(event.storage, "temporary")] += event.change
        columns = {name: [size] for name, size in sizes.items()}
        for event in self.events[start:end]:
            sizes[self._category.get(event.storage, "temporary")] += event.change
            for name, size in sizes.items():
                columns[name].append(size)
        totals = [sum(column) for column in zip(*columns.values(), strict=True)]
        if len(totals) <= most:
            at = list(range(len(totals)))
        else:
            # The first and the last instant are kept beside the stretches' two each.
            stretch = -(-len(totals) // ((most - 2) // 2))
            kept = {0, len(totals) - 1}
            for first in range(0, len(totals), stretch):
                instants = range(first, min(first + stretch, len(totals)))
                kept |= {min(instants, key=totals.__getitem__), max(instants, key=totals.__getitem__)}
            at = sorted(kept)
        return at, {name: [column[i] for i in at] for name, column in columns.items()}

    def peak_of_born(self, start: int, end: int | None = None) -> int:
        """The most bytes live in the span of storages born in it: what an allocator's trace of the span can know."""
        known = {event.storage for event in self.events[:start]}
        total = most = 0
        for event in self.events[start:end]:
            if event.storage not in known:
                total += event.change
                most = max(most, total)
        return most


@contextmanager
def steady_collection() -> Iterator[None]:
    """Collect garbage cycles now and not inside: what a step holds must not depend on when the collector runs."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class AllocatorTrace:
    """The CPU allocator's own account of a stretch of code, independent of the tracker.

    `peak_bytes` is the most that was allocated at once since the start, counting only what was allocated since: memory
    from before is unknown to it, alive or freed.
    """

    def __init__(self):
        self._profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=False
        )
        self.peak_bytes: int | None = None
        self.left_bytes: int | None = None

    def __enter__(self) -> AllocatorTrace:
        self._profiler.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._profiler.__exit__(*exception)
        total = most = 0
        sizes: dict[int, int] = {}  # address -> bytes, of what was allocated since the start and lives
        for address, change in self._changes():
            if change > 0:
                sizes[address] = change
                total += change
            else:
                # torch also reports that blocks of an earlier trace are freed, in the size that they had then.
                total -= sizes.pop(address, 0)
            most = max(most, total)
        self.peak_bytes, self.left_bytes = most, total

    def _changes(self) -> Iterable[tuple[int, int]]:
        """(address, change in bytes) of every allocation and every free, in their order."""
        events, pending = [], list(self._profiler.profiler.kineto_results.experimental_event_tree())
        while pending:
            event = pending.pop()
            pending.extend(event.children)
            if event.name == "[memory]":
                events.append(event)
        # The tree is not in order; one thread allocates, so its clock gives it back.
        events.sort(key=lambda event: event.start_time_ns)
        return [(event.extra_fields.ptr, event.extra_fields.alloc_size) for event in events]
