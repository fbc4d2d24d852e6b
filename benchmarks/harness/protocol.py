"""THE measured run: build, prepare, warm up, then measure a steady-state step, the third or later.

It is measured twice, each time from a fresh build. The plain pass (plain.py) comes first and has no instrument in it:
it gives the times, the entries that training touches, and the process's high-water mark, which the instruments of the
other pass would raise. The tracked pass, here, gives the bytes. All methods see the same batches and the same dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from baselines.method import Method, ParameterCounts, Setting, target_shapes
from baselines.registry import get
from benchmarks.harness.cuda import AllocatorMeter, history, release_unused
from benchmarks.harness.memory import AllocatorTrace, Peak, Span, Tracker, steady_collection
from benchmarks.harness.nvml import process_bytes
from benchmarks.harness.spec import RunSpec
from benchmarks.harness.workload import Pass, Workload
from reports.record import BREAKDOWN
from reports.timeline import Timeline

WARM_UP_STEPS = 2
# A record carries its timeline, and a file hundreds of records: this many samples are about 8 kB.
TIMELINE_SAMPLES = 160

Phase = Callable[[str], AbstractContextManager]


class Diverged(RuntimeError):
    """A loss that is not finite."""


@dataclass
class Trained:
    """A model made ready by a method, and what its training steps need."""

    workload: Workload
    method: Method
    model: nn.Module
    optimizers: list[Optimizer]

    @property
    def passes(self) -> int:
        """How many micro-batches a step has."""
        return self.method.setting.accumulate


def build(
    spec: RunSpec, workload: Workload, make_model: Callable[[], nn.Module] | None = None
) -> tuple[Method, nn.Module, Sequence[tuple[int, int]]]:
    """The method, the unprepared model (by default the workload's), and the shapes of the method's target weights."""
    torch.manual_seed(spec.seed)
    model = (make_model or workload.build)()
    layers = workload.layers(model)
    setting = Setting(
        layers=layers,
        train_rest=spec.train_rest,
        adapter_dtype=spec.adapter_dtype,
        optimizer=spec.optimizer,
        optimizer_impl=spec.optimizer_impl,
        accumulate=spec.accumulate,
        calibration_steps=spec.calibration_steps,
        seed=spec.seed,
        backward=workload.run_backward,
    )
    return get(spec.method)(spec.budget, setting), model, target_shapes(model, layers)


def ready(spec: RunSpec, workload: Workload, method: Method, model: nn.Module) -> Trained:
    """The prepared model with its optimizers; dropout starts anew, however much of it the preparation used."""
    torch.manual_seed(spec.seed)
    return Trained(workload, method, model, method.optimizers(model, spec.lr))


def training_step(
    state: Trained, batch: object, phase: Phase, after: Callable[[str], None] = lambda _: None
) -> float | None:
    """One step, as every pass runs it: forward, backward, optimizer, gradients freed. Returns the loss.

    Where gradients are accumulated, forward and backward come several times, of the same batch, and the loss is their
    mean. `after` is called when a phase's work is done and its results still live.
    """
    losses, result = [], None
    for number in range(state.passes):
        if result is not None:
            result.release()
        result, loss = forward_backward(state, batch, number, phase, after)
        losses.append(loss)
    update(state, phase, after)
    result.release()
    return mean_loss(losses)


def forward_backward(
    state: Trained, batch: object, number: int, phase: Phase, after: Callable[[str], None] = lambda _: None
) -> tuple[Pass, float | None]:
    """Pass `number`, from 0, of a step's `passes`: gradients are added up. Returns what is still held, and the loss."""
    with phase("forward"):
        result = state.workload.forward(state.model, batch)
        after("forward")
    with phase("backward"):
        loss = state.workload.backward(result, state.passes)
        if number == state.passes - 1:
            state.method.after_backward(state.model)
        after("backward")
        for tensor in state.workload.inputs(batch):
            tensor.grad = None
        if not state.workload.keeps_outputs:
            result.release()
    return result, loss


def update(state: Trained, phase: Phase, after: Callable[[str], None] = lambda _: None) -> None:
    """The optimizers' step, by the gradients there are, which are then freed."""
    with phase("optimizer"):
        for optimizer in state.optimizers:
            optimizer.step()
        state.method.after_step(state.model)
        after("optimizer")
    state.model.zero_grad(set_to_none=True)


def mean_loss(losses: Sequence[float | None]) -> float | None:
    """Of a step's passes; None where there is none. Raises `Diverged` for one that is not finite."""
    if None in losses:
        return None
    loss = sum(losses) / len(losses)
    if not math.isfinite(loss):
        raise Diverged(f"the loss is {loss}")
    return loss


@dataclass
class TrackedPass:
    """The tracked pass when its steps are done: the model as it is now, and where in the tracker's log it did what."""

    state: Trained
    batch: object
    tracker: Tracker
    counts: ParameterCounts
    losses: list[float | None]
    updated: list[int]  # entries that the gradients name, after each backward pass
    preparation: Span
    spans: dict[str, list[Span]]  # phase -> where it was in the log, step by step
    steps: Span  # the steps of one period
    evaluation: Span
    own_batch: set[int]  # the batch's storages, which are not part of what stays

    def facts(self) -> dict[str, object]:
        """The fields of a record that are not peaks: counts, losses, the timeline."""
        return {
            **asdict(self.counts),
            "updated_params": max(self.updated),
            "state_params": state_params(self.state.optimizers),
            "timeline": timeline(self.tracker, self.spans, self.steps.start, self.steps.end).dumps(),
            "padding_fraction": self.state.workload.padding_fraction(self.batch),
            "loss_first": self.losses[0],
            "loss_last": self.losses[-1],
        }

    def peaks(self) -> dict[str, object]:
        """The peaks as the tracker counts them, and what was live at the largest."""
        peak = {name: max(self.most(span) for span in those) for name, those in self.spans.items()}
        step = self.tracker.peak(self.steps.start, self.steps.end)
        return {
            **{f"peak_{name}_bytes": value for name, value in peak.items()},
            **breakdown(step),
            "resident_bytes": self.tracker.live_at(self.steps.end, without=self.own_batch),
            "peak_step_bytes": step.bytes,
            # No birth in a step: it starts with its peak.
            "peak_phase": step.phase or "forward",
            "peak_eval_bytes": self.most(self.evaluation),
            "peak_preparation_bytes": self.most(self.preparation),
        }

    def workspace(self, span: Span, trace: AllocatorTrace) -> int:
        """What the allocator's trace of the same work has beyond the tracker."""
        return trace.peak_bytes - self.tracker.peak_of_born(span.start, span.end)

    def most(self, span: Span) -> int:
        """The most bytes live in a span, as the tracker counts them."""
        return self.tracker.peak(span.start, span.end).bytes


def track(
    spec: RunSpec,
    workload: Workload,
    tracker: Tracker,
    make_model: Callable[[], nn.Module] | None = None,
    witness: AbstractContextManager | None = None,
    warm_up_steps: int = WARM_UP_STEPS,
) -> TrackedPass:
    """Prepare and step a new model under the tracker, as the measured and the predicted pass both do it.

    Args:
        spec: what is asked for.
        workload: the spec's.
        tracker: a new one.
        make_model: makes the unprepared model; the workload's `build` by default.
        witness: entered around the preparation, which nobody can repeat.
        warm_up_steps: steps before the first that counts.
    """
    method, model, shapes = build(spec, workload, make_model)
    tracker.adopt(model)
    preparation = _track_preparation(tracker, method, model, workload.batches(), witness or nullcontext())
    counts = method.counts(model, shapes)
    state = ready(spec, workload, method, model)
    _mark_what_stays(tracker, state)

    # An iterator of its own: what the preparation drew must not change what is measured.
    batch = next(workload.batches())
    tracker.mark("activation", batch)
    with tracker:
        losses = [training_step(state, batch, tracker.phase) for _ in range(warm_up_steps)]
    _mark_what_stays(tracker, state)

    spans: dict[str, list[Span]] = {}
    updated: list[int] = []
    torch.manual_seed(spec.seed)
    with tracker, steady_collection():
        method.begin_period(state.optimizers)
        with tracker.phase("idle") as steps:
            for _ in range(method.period):
                losses.append(_tracked_step(state, batch, tracker, spans, updated))
        own_batch = tracker.serials(batch)
        evaluation = _evaluate(state, batch, tracker.phase("eval"))
    if workload.mixed:
        tracker.order_deaths()
    return TrackedPass(state, batch, tracker, counts, losses, updated, preparation, spans, steps, evaluation, own_batch)


def measure_memory(spec: RunSpec, workload: Workload) -> dict[str, object]:
    """The memory fields and counts of a record, and the losses of the first and the last step."""
    if torch.device(spec.device).type == "cuda":
        return _metered(spec, workload)
    preparation_trace = AllocatorTrace()
    done = track(spec, workload, Tracker(), witness=preparation_trace)
    with steady_collection(), AllocatorTrace() as trace:
        _repeat_steps(spec, done, untracked)
    return {
        **done.facts(),
        **done.peaks(),
        "kernel_workspace_bytes": done.workspace(done.steps, trace),
        "preparation_workspace_bytes": done.workspace(done.preparation, preparation_trace),
    }


def _track_preparation(
    tracker: Tracker, method: Method, model: nn.Module, batches: Iterator[object], witness: AbstractContextManager
) -> Span:
    with steady_collection(), witness, tracker, tracker.phase("preparation") as span:
        method.prepare(model, batches)
    return span


def _mark_what_stays(tracker: Tracker, state: Trained) -> None:
    """Say what is basis, optimizer state and parameter now: a step may replace what it does not update in place."""
    tracker.mark("basis", list(state.method.basis_tensors(state.model)))
    tracker.mark("optimizer", *state.optimizers)
    # Not the module, which has its gradients too.
    tracker.mark("parameter", [*state.model.parameters(), *state.model.buffers()])


def _tracked_step(
    state: Trained, batch: object, tracker: Tracker, spans: dict[str, list[Span]], updated: list[int]
) -> float | None:
    """A step whose storages are marked as they show what they are."""
    began = tracker.position

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        nonlocal began
        began = tracker.position
        with tracker.phase(name) as span:
            yield
        spans.setdefault(name, []).append(span)

    def after(name: str) -> None:
        if name == "forward":
            tracker.mark_born_since("activation", began)
        elif name == "backward":
            tracker.mark("gradient", gradients(state.model), [t.grad for t in state.workload.inputs(batch)])
            updated.append(sum(written_entries(g) for g in gradients(state.model)))
        else:
            _mark_what_stays(tracker, state)

    return training_step(state, batch, phase, after)


def _evaluate(state: Trained, batch: object, phase: AbstractContextManager) -> Span | None:
    """A forward without gradients inside `phase`; gives what that gives."""
    state.model.eval()
    with torch.no_grad(), phase as span:
        result = state.workload.forward(state.model, batch)
    result.release()
    state.model.train()
    return span


def _repeat_steps(spec: RunSpec, done: TrackedPass, phase: Phase) -> None:
    """The tracked steps once more, without the tracker."""
    # Their dropout again: which stripes of dL/dY are zero, and so are skipped, depends on it.
    torch.manual_seed(spec.seed)
    done.state.method.begin_period(done.state.optimizers)
    for _ in range(done.state.method.period):
        training_step(done.state, done.batch, phase)


def gradients(model: nn.Module) -> list[Tensor]:
    """The gradients that exist."""
    return [p.grad for p in model.parameters() if p.grad is not None]


def written_entries(gradient: Tensor) -> int:
    """The entries that an optimizer writes for a gradient: all of a dense one's, the stored ones of a sparse one."""
    if gradient.layout == torch.sparse_coo:
        return gradient._nnz() * math.prod(gradient.shape[gradient.sparse_dim() :])
    return gradient.numel()


def state_params(optimizers: Sequence[Optimizer]) -> int:
    """Entries for which optimizers keep moments: for each parameter, the largest of its state tensors."""
    return sum(
        max((value.numel() for name, value in state.items() if isinstance(value, Tensor) and name != "step"), default=0)
        for optimizer in optimizers
        for state in optimizer.state.values()
    )


def breakdown(peak: Peak) -> dict[str, int]:
    """The breakdown fields of a record; they add up to the peak exactly."""
    return {name: peak.by_category[name.removesuffix("_bytes")] for name in BREAKDOWN}


def timeline(tracker: Tracker, spans: dict[str, list[Span]], first: int, last: int) -> Timeline:
    """Live bytes through the steps from position `first` of the log to `last`, with the phases that `spans` holds.

    On CUDA too these are the tracker's: requested bytes, without the allocator's rounding.
    """
    starts = [(span.start - first, name) for name, those in spans.items() for span in those]
    starts += [(span.end - first, "zero_grad") for span in spans["optimizer"]]
    at, series = tracker.series(first, last, TIMELINE_SAMPLES)
    by_category = {name: tuple(series[name.removesuffix("_bytes")]) for name in BREAKDOWN}
    # A step begins with its forward; what the log has before belongs to nobody.
    return Timeline(tuple((name, start) for start, name in sorted(starts)), tuple(at), by_category)


def untracked(_: str) -> AbstractContextManager:
    """A phase that nobody watches."""
    return nullcontext()


def _metered(spec: RunSpec, workload: Workload) -> dict[str, object]:
    """`measure_memory` on CUDA: the peaks are the allocator's, and the tracker tells what they were."""
    device = torch.device(spec.device)
    preparation, steps, evaluation = (AllocatorMeter(device) for _ in range(3))
    release_unused(device)
    done = track(spec, workload, Tracker(device.type), witness=preparation.phase("preparation"))
    facts = done.facts()
    with steady_collection():
        # What the preparation and the tracked steps left in the cache is not these steps': it would count as reserved,
        # and its blocks can be handed out whole, up to 1 MiB larger than what is asked for.
        torch.cuda.empty_cache()
        with history(spec.snapshot):
            _repeat_steps(spec, done, steps.phase)
        charged = process_bytes(device)
        _evaluate(done.state, done.batch, evaluation.phase("eval"))
        # Let go rather than subtracted: the blocks of a batch are larger than its tensors, nobody says by how much.
        done.batch = None
        resident = steps.live()
    return {
        **facts,
        **{f"peak_{name}_bytes": peak.allocated_bytes for name, peak in steps.peaks.items()},
        **allocated_breakdown(done, steps),
        "resident_bytes": resident,
        "peak_step_bytes": steps.peak.allocated_bytes,
        "peak_eval_bytes": evaluation.peak.allocated_bytes,
        "peak_preparation_bytes": preparation.peak.allocated_bytes,
        "kernel_workspace_bytes": steps.peak.requested_bytes - done.most(done.steps),
        "preparation_workspace_bytes": preparation.peak.requested_bytes - done.most(done.preparation),
        "peak_requested_bytes": steps.peak.requested_bytes,
        "peak_reserved_bytes": steps.peak.reserved_bytes,
        "nvml_process_bytes": charged,
        "alloc_retries": steps.retries,
        "alloc_ooms": steps.ooms,
    }


def allocated_breakdown(done: TrackedPass, steps: AllocatorMeter) -> dict[str, object]:
    """The phase of the allocator's peak, and what was live then: the tracker's peak of that phase, made up to it.

    What the allocator has beyond the tracker, its rounding and the workspaces, is temporary. It can also have less, by
    what dispatch to the tracker keeps for an instant longer: so much less is temporary. Where that would be less than
    nothing the two did not see the same step, and the breakdown is None.
    """
    phase = max(steps.peaks, key=lambda name: steps.peaks[name].allocated_bytes)
    tracked = max((done.tracker.peak(span.start, span.end) for span in done.spans[phase]), key=lambda peak: peak.bytes)
    parts: dict[str, int | None] = dict(breakdown(tracked))
    parts["temporary_bytes"] += steps.peaks[phase].allocated_bytes - tracked.bytes
    if parts["temporary_bytes"] < 0:
        parts = dict.fromkeys(parts)
    return {"peak_phase": phase, **parts}
