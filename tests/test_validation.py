"""Predictions against training steps that others measured on a Tesla T4, row by row."""

import pytest

from benchmarks.harness.measured import measured_steps
from benchmarks.validation import predicted_step


@pytest.mark.parametrize("step", measured_steps(), ids=lambda step: step.label)
def test_a_measured_step_is_predicted(step):
    found = predicted_step(step)
    reserved = found.pop("peak_reserved_mib")
    # The figures are published to 0.01 MiB.
    assert found == {name: pytest.approx(getattr(step, name), rel=0.005, abs=0.01) for name in found}
    assert len(found) == 3
    assert reserved == pytest.approx(step.peak_reserved_mib, rel=0.05)
