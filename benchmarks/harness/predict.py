"""The protocol on fake tensors: what a run would measure, without its memory or its time.

It is the tracked pass of protocol.py, step for step, on fake CPU tensors (fake.py): the model, the method's
preparation (calibration and decomposition included), two warm-up steps, the measured period, an evaluation. The
tracker sees the same storages born and die in the same order as in a run.

What is modelled, with the CPU's semantics: every storage that an operation returns, as its CPU kernel does, until the
last reference to it is gone. Each `_bytes` field of the tracker, each count and the timeline equal a run's to the byte.

With CUDA's semantics, the default: what its kernels do otherwise (cuda_kernels.py says what is modelled and what is
not), on a card of the given compute capability. The log of requests then goes through a model of the caching allocator
(caching_allocator.py), so that the `_bytes` fields are ALLOCATED bytes, as in a measured record, and
`peak_requested_bytes` and `peak_reserved_bytes` stand beside them. Whether a card's memory suffices (`fits`) is found
by the same allocator with a limit, preparation included, where `CONTEXT_BYTES` are left to the CUDA context.

What is not: the CPU kernels' own workspaces and the process's high-water mark (`kernel_workspace_bytes`,
`preparation_workspace_bytes`, `process_peak_bytes` are None), times and losses; a run that diverges.

What depends on values, and how it is known:
 - Tokens, masks, labels, positions, counters and what is drawn with a seed of its own are known and questions about
   them are answered (whether a batch is padded, for one), in tensors of up to `MOST_KNOWN` entries.
 - The supports of `random-mask` are the run's own where no target weight has more than `MOST_KNOWN` entries. In larger
   ones, and in those of `sparsegrad-fixed` and `sift`, which follow from gradients, the entries are taken to be spread
   evenly over the blocks of rows. A run skips blocks without an entry and multiplies few columns of one whose entries
   lie in few, so its backward can hold less while it makes their gradient, before dL/dX exists.
 - The blocks of `smt`, which follow from gradients too, are taken to be spread evenly over the layers, and in a layer
   over as many columns as they can lie in. A run whose blocks share columns saves less of X.
 - The rows of dL/dY that are zero, which every method skips, are what the workload says (`gradient_rows`): tokens whose
   output does not reach the loss. Columns, which the sparse-by-dense product skips too (`sparsegrad`,
   `meprop-weight`), are taken to hold a non-zero; where dropout or an activation could well have emptied many, the
   prediction is refused.
 - Checks that values are sound (finite gradients) pass.
 - Any other question about values ends the prediction: its status is `refused`, and the reason names it.

Where all batches look alike, a method's calibration is run for two steps, since every later one repeats the second; the
step that counts is the second after the preparation, which every later one repeats too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.autograd.function import BackwardCFunction
from torch.nn.modules.module import register_module_forward_hook

from baselines.method import MethodError
from benchmarks.harness import cards
from benchmarks.harness.caching_allocator import CachingAllocator, OutOfMemory, Replay
from benchmarks.harness.cuda_kernels import CudaKernels, Unmodelled
from benchmarks.harness.environment import environment
from benchmarks.harness.errors import InputError
from benchmarks.harness.fake import KnownValues, lay_fakes, moved_in_place, not_traced
from benchmarks.harness.memory import Event, Tracker
from benchmarks.harness.protocol import TrackedPass, track
from benchmarks.harness.spec import RunSpec
from benchmarks.harness.workload import Workload
from reports.capacity import CONTEXT_BYTES
from reports.record import Record
from sparsegrad import SparseGradError, SparseGradLinear
from sparsegrad.adapted import AdaptedLinear
from sparsegrad.products import LEAST_ZERO_SHARE

SEMANTICS = ("cuda", "cpu")

# From the second step on each finds what the one before it left: a third of the preparation, or of the warm-up, would
# repeat it.
CALIBRATION_STEPS = 2
WARM_UP_STEPS = 1
# Refused where by these odds dropout empties as many columns of a layer's dL/dY as are left out of products.
EMPTIED = 1e-4
# What tells of a matrix's lines whether they hold a non-zero, and what is made of that.
EXTREMES = (torch.ops.aten.amax.default, torch.ops.aten.amin.default)
MADE_OF_EXTREMES = (torch.ops.aten.ne.Scalar, torch.ops.aten.bitwise_or.Tensor, torch.ops.aten.sum.default)


class Unknown(ValueError):
    """A question about values that nothing answers."""


def predict(spec: RunSpec) -> Record:
    """The record that a run of `spec` would give, as far as it can be known; status `refused` where it cannot.

    Where the steps fail, as they do for a config whose values do not go together, the status is `crashed`.
    `spec.device` names whose kernels' semantics are meant. Raises `InputError` for a spec that no run could take.
    """
    if spec.device not in SEMANTICS:
        raise InputError(f"the semantics of a prediction must be one of {', '.join(SEMANTICS)}, got {spec.device!r}")
    if spec.device == "cuda":
        spec = replace(spec, gpu=spec.gpu or cards.DEFAULT)
    # Fake tensors are the CPU's: it has the kernels that torch needs to know what an operation returns.
    workload = spec.workload(device="cpu")
    try:
        outcome = _predicted(spec, workload)
    except (MethodError, SparseGradError, InputError, Unknown, Unmodelled) as error:
        outcome = {"status": "refused", "reason": str(error)}
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        outcome = {"status": "refused", "reason": f"what {error.func} returns depends on values that are not known"}
    except (UnsupportedFakeTensorException, UnsupportedOperatorException) as error:
        outcome = {"status": "refused", "reason": f"torch cannot run this on fake tensors: {error}"}
    except Exception as error:
        # As in a measured run, whose worker ends: what is wrong with one method or model costs no other's record.
        first = str(error).partition("\n")[0]
        outcome = {"status": "crashed", "reason": f"{type(error).__name__}: {first}"}
    # Nothing ran: no processor, threads or allocator had a part in it.
    facts = environment("cpu") | dict.fromkeys(("device_name", "driver", "threads", "allocator"))
    return spec.blank(workload.name, source="predicted", data=workload.data, **facts, **outcome)


def _predicted(spec: RunSpec, workload: Workload) -> dict[str, object]:
    if workload.batches_alike(spec.calibration_steps):
        spec = replace(spec, calibration_steps=min(spec.calibration_steps, CALIBRATION_STEPS))
    mode = FakeTensorMode()
    model = lay_fakes(workload.skeleton(), mode)
    answers = Answers(model, workload.gradient_rows(), workload.columns_hold)
    cuda = CudaKernels(cards.card(spec.gpu)) if spec.device == "cuda" else None
    tag = register_module_forward_hook(answers.tag)
    try:
        with mode, answers, not_traced(), moved_in_place(), nullcontext() if cuda is None else cuda.functions():
            tracker = Tracker(fake=True, kernels=cuda)
            done = track(spec, workload, tracker, lambda: model, warm_up_steps=WARM_UP_STEPS)
            if cuda is None:
                return {**done.facts(), **done.peaks()}
            return {**_on_card(done, spec.gpu_memory_bytes), "attention_kernel": cuda.attention_kernel}
    finally:
        tag.remove()


def _on_card(done: TrackedPass, memory_bytes: int | None) -> dict[str, object]:
    """What the caching allocator makes of the requests in the log, and whether a card of `memory_bytes` has them."""
    log, steps = done.tracker.events, done.steps
    allocator = CachingAllocator()
    replay = Replay(allocator)
    changes = replay.feed(log[: steps.start])
    # As the measured run does it: what earlier passes left in the cache is not this step's.
    allocator.empty_cache()
    allocator.reset_peaks()
    changes += replay.feed(log[steps.start : steps.end])
    most = allocator.peak
    changes += replay.feed(log[steps.end :])
    # From here on the log is one of allocated bytes: whole blocks.
    done.tracker.events = [event._replace(change=change) for event, change in zip(log, changes, strict=True)]
    return {
        **done.facts(),
        **done.peaks(),
        "peak_requested_bytes": most.requested_bytes,
        "peak_reserved_bytes": most.reserved_bytes,
        **({} if memory_bytes is None else _fits(log, memory_bytes)),
    }


def _fits(log: Sequence[Event], memory_bytes: int) -> dict[str, object]:
    """Whether the whole run, preparation included, finds room; where it does not, the phase that fails."""
    try:
        Replay(CachingAllocator(max(0, memory_bytes - CONTEXT_BYTES))).feed(log)
    except OutOfMemory as error:
        return {"fits": False, "oom_phase": "loading" if error.phase == "idle" else error.phase}
    return {"fits": True}


class Answers(KnownValues):
    """Known values, and which lines of dL/dY hold a non-zero.

    Args:
        model: the model that the method adapts.
        rows: the workload's `gradient_rows`.
        columns_hold: the workload's.
    """

    def __init__(self, model: nn.Module, rows: Mapping[str, int | None], columns_hold: bool):
        super().__init__()
        self._model, self._rows, self._columns_hold = model, rows, columns_hold
        # Weak: a layer that a method replaces must not outlive its place.
        self._names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()

    def tag(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """A forward hook: the backward function of an adapted layer learns the layer's name, if it has one."""
        if not isinstance(module, AdaptedLinear) or output.grad_fn is None:
            return
        if module not in self._names:
            self._names.update({layer: name for name, layer in self._model.named_modules()})
        # A layer made of plain operations has none, and what comes before its input is another layer's.
        node, before = output.grad_fn, inputs[0].grad_fn
        while node not in (None, before) and not isinstance(node, BackwardCFunction):
            node = node.next_functions[0][0] if node.next_functions else None
        if node not in (None, before):
            node.metadata["layer"] = self._names[module]

    def done(self, func, args, result):
        """Extremes of lines, and what is made of them, tell whether lines hold a non-zero, and remember of what."""
        if func in EXTREMES and len(args) > 1:
            result.lines_of = (tuple(args[0].shape), tuple(args[1]))
        elif func in MADE_OF_EXTREMES and hasattr(args[0], "lines_of"):
            result.lines_of = args[0].lines_of

    def value_unknown(self, func, args, kwargs):
        """How many lines hold a non-zero, in a layer's backward."""
        count = self._count(args[0]) if func is torch.ops.aten._local_scalar_dense.default else None
        return super().value_unknown(func, args, kwargs) if count is None else count

    def shape_unknown(self, func, args, kwargs):
        """The indices of the lines that hold a non-zero, in a layer's backward."""
        count = self._count(args[0]) if func is torch.ops.aten.nonzero.default else None
        if count is None:
            return super().shape_unknown(func, args, kwargs)
        return torch.empty((count, 1), dtype=torch.int64)

    def _count(self, told: Tensor) -> int | None:
        """How many lines hold a non-zero, of the matrix that `told` tells it of; None where it tells something else."""
        node = torch._C._current_autograd_node()
        layer = node.metadata.get("layer") if node is not None else None
        if layer is None or not hasattr(told, "lines_of"):
            return None
        shape, dims = told.lines_of
        rows = self._live_rows(layer, shape[0])
        if dims == (1,):
            return rows
        self._check_columns(layer, shape[1], rows)
        return shape[1]

    def _live_rows(self, layer: str, rows: int) -> int:
        live = next((n for pattern, n in self._rows.items() if re.search(pattern, layer)), None)
        if live is not None and 0 < live <= rows:
            return live
        raise Unknown(f"it is not known which rows of dL/dY are zero in {layer!r}, and they are skipped")

    def _check_columns(self, layer: str, columns: int, rows: int) -> None:
        """Refuse where so many columns may well be zero that they are left out."""
        # A change of basis fills every column.
        if isinstance(self._model.get_submodule(layer), SparseGradLinear):
            return
        if not self._columns_hold:
            raise Unknown(f"it is not known which columns of dL/dY are zero in {layer!r}, and they are skipped")
        dropout = max((m.p for m in self._model.modules() if isinstance(m, nn.Dropout)), default=0.0)
        if _log_odds(columns, math.ceil(LEAST_ZERO_SHARE * columns), dropout**rows) > math.log(EMPTIED):
            raise Unknown(
                f"dropout of {dropout:g} may empty many columns of dL/dY in {layer!r}, where {rows} rows reach the "
                "loss, and they are skipped; predict a larger batch"
            )


def _log_odds(count: int, least: int, chance: float) -> float:
    """A bound on the logarithm of the odds that `least` or more of `count` befalls what befalls each by `chance`."""
    if not chance:
        return -math.inf
    ways = math.lgamma(count + 1) - math.lgamma(least + 1) - math.lgamma(count - least + 1)
    return ways + least * math.log(chance)
