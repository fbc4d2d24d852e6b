"""Equal budgets: the nearest one, found against a plain search over every budget."""

import pytest

from baselines.registry import methods
from benchmarks.harness.budget import budget_params, equal_trainable

ENCODER = [(1536, 384), (384, 1536)] * 6
ODD = [(53, 37), (37, 53), (11, 13)]


def test_rank_7_of_the_encoder():
    reference = budget_params("lora", 7, ENCODER)
    assert reference == 12 * 7 * (384 + 1536)
    # Entries: the same number in each layer. Outputs: k rows of D_in entries, over both kinds 2 (D_in + D_out) / 2.
    assert equal_trainable("sparsegrad", reference, ENCODER) == 7 * (384 + 1536)
    assert equal_trainable("random-mask", reference, ENCODER) == 7 * (384 + 1536)
    assert equal_trainable("meprop-unified", reference, ENCODER) == 14
    assert equal_trainable("lora", reference, ENCODER) == 7


def test_a_method_without_a_budget_has_none_to_match():
    assert equal_trainable("full", 1000, ENCODER) is None
    assert budget_params("full", None, ENCODER) is None


@pytest.mark.parametrize("reference", [1, 2, 100, 101, 345, 10**9])
@pytest.mark.parametrize("name", [name for name, cls in methods().items() if cls.knob])
def test_nothing_is_nearer(name, reference):
    found = equal_trainable(name, reference, ODD)
    largest = methods()[name].largest_budget(ODD)
    nearest = min(abs(budget_params(name, b, ODD) - reference) for b in range(1, largest + 1))
    assert abs(budget_params(name, found, ODD) - reference) == nearest
