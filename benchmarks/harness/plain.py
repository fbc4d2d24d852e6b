"""The plain pass: training steps without any instrument, timed one round at a time.

A round is one period of the method's steps (one step for most methods). Whoever drives the pass decides when a round
runs, so that it can stand next to a round of another process; see pairing.py.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness.environment import process_peak_bytes
from benchmarks.harness.memory import steady_collection
from benchmarks.harness.protocol import (
    WARM_UP_STEPS,
    build,
    forward_backward,
    mean_loss,
    ready,
    untracked,
    update,
)
from benchmarks.harness.spec import RunSpec
from benchmarks.harness.workload import Workload


class PlainPass:
    """A method made ready and warmed up, then stepped as often as it is asked to."""

    def __init__(self, spec: RunSpec, workload: Workload):
        method, model, _ = build(spec, workload)
        device = torch.device(spec.device)
        started = time.perf_counter()
        method.prepare(model, workload.batches())
        _wait(device)
        self.preparation_time_s = time.perf_counter() - started
        self.steps = 0
        self._state = ready(spec, workload, method, model)
        self._clock = _EventClock() if device.type == "cuda" else _Clock()
        self._batches = workload.batches()
        self._before = Snapshot(model)
        self._open = ExitStack()
        self._open.enter_context(self._before)
        self._open.enter_context(steady_collection())
        for _ in range(WARM_UP_STEPS):
            self._step()

    @property
    def period(self) -> int:
        """The number of steps of a round."""
        return self._state.method.period

    def round(self) -> float:
        """One period of steps; gives the mean time of a step in seconds, the drawing of batches left out."""
        self._state.method.begin_period(self._state.optimizers)
        return sum(share * self._step() for share in self._state.method.step_shares())

    def _step(self) -> float:
        seconds, losses, result = 0.0, [], None
        for number in range(self._state.passes):
            # Drawn one by one, apart from the time: batches that wait for their step would raise the high-water mark.
            batch = next(self._batches)
            self._clock.start()
            if result is not None:
                result.release()
            result, loss = forward_backward(self._state, batch, number, untracked)
            losses.append(loss)
            if number == self._state.passes - 1:
                update(self._state, untracked)
                result.release()
            seconds += self._clock.stop()
        mean_loss(losses)
        self.steps += 1
        return seconds

    def finish(self) -> dict[str, object]:
        """What a record has from this pass besides the times, and the period; the model is let go."""
        high_water = process_peak_bytes()
        touched = self._before.changed_entries()
        period = self.period
        self._open.close()
        del self._state, self._before, self._batches
        return {
            "preparation_time_s": self.preparation_time_s,
            "process_peak_bytes": high_water,
            "touched_params": touched,
            "touched_steps": self.steps,
            "period": period,
        }


class _Clock:
    """Seconds on the CPU, whose operations are done when they return."""

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> float:
        return time.perf_counter() - self._started


class _EventClock:
    """Seconds between two events in the GPU's stream: what the GPU was given to do, waited for at the end."""

    def start(self) -> None:
        torch.cuda.synchronize()
        self._first, self._last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._first.record()

    def stop(self) -> float:
        self._last.record()
        self._last.synchronize()
        return self._first.elapsed_time(self._last) / 1e3  # milliseconds


class Snapshot:
    """The trainable parameters as they are now, in a file: a copy in memory would raise the high-water mark."""

    def __init__(self, model: nn.Module):
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._file = tempfile.TemporaryFile()

    def __enter__(self) -> Snapshot:
        for parameter in self._parameters:
            _bytes_of(parameter).tofile(self._file)
        self._file.seek(0)
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def changed_entries(self) -> int:
        """Entries whose bytes differ from the snapshot's."""
        changed = 0
        for parameter in self._parameters:
            now = _bytes_of(parameter)
            changed += int((np.fromfile(self._file, now.dtype, now.size) != now).sum())
        return changed


def _bytes_of(parameter: Tensor) -> np.ndarray:
    """The parameter's entries as integers of their width: comparable whatever the dtype, -0 and NaN included."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return parameter.detach().cpu().contiguous().view(width).numpy().reshape(-1)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
