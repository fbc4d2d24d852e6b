"""Workers without processes, for tests of what drives them."""

from benchmarks.harness import pairing
from benchmarks.harness.spec import RunSpec
from benchmarks.harness.worker import RunFailed, failed

SPEC = RunSpec(method="lora", budget=2, layer=(16, 24), batch=2, seq=4, rounds=6, calibration_steps=2)
SECONDS = {"full": 2.0, "lora": 1.0, "head": 0.5}


class FakeWorker:
    """Stands in for a worker process: steps take what `script` says, and fail where it says a status."""

    def __init__(self, spec, _, script, log):
        self.spec, self.log = spec, log
        self._script = script.get(spec.method, {})
        log.append(("start", spec.method))

    def _do(self, what, value):
        self.log.append((what, self.spec.method))
        outcome = self._script.get(what, value)
        outcome = outcome() if callable(outcome) else outcome
        if isinstance(outcome, str):
            raise RunFailed(failed(self.spec, outcome, "as told"))
        return outcome

    def prepare(self):
        self._do("prepare", None)

    def renew(self):
        pass

    def round(self):
        return self._do("round", SECONDS[self.spec.method])

    def plain(self):
        return dict(self._do("plain", {"touched_params": 5, "touched_steps": 8, "period": 1}))

    def memory(self):
        return dict(self._do("memory", {"peak_step_bytes": 77, "model": "layer 16x24"}))

    def high_water_bytes(self):
        return self._script.get("high_water_bytes", 10)

    def close(self):
        self.log.append(("close", self.spec.method))


def fake_workers(monkeypatch):
    """(script, log): what the workers do, and what they were asked to do."""
    script, log = {}, []
    monkeypatch.setattr(pairing, "Worker", lambda spec, limit: FakeWorker(spec, limit, script, log))
    return script, log


def alive(log):
    """The most workers that were alive at once."""
    now = most = 0
    for what, _ in log:
        now += {"start": 1, "close": -1}.get(what, 0)
        most = max(most, now)
    return most


def once(status, otherwise):
    """Fails with `status` the first time, then gives `otherwise`."""
    outcomes = iter([status])
    return lambda: next(outcomes, otherwise)
