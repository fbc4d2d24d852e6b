"""The real encoder and the real decoder on real text."""

import pytest

from benchmarks import matrix


@pytest.mark.parametrize(("model", "train_rest", "method"), matrix.models())
def test_model(measured, model, train_rest, method):
    measured(method, model=model, train_rest=train_rest)
