"""Cards by name."""

import pytest

from benchmarks.harness.cards import DEFAULT, card
from benchmarks.harness.errors import InputError


def test_names_and_capabilities():
    assert card("T4").capability == card("7.5").capability == (7, 5)
    assert card("rtx-4090").capability == (8, 9)
    assert card(DEFAULT).capability == (9, 0)
    assert card("12.0").capability == (12, 0)


@pytest.mark.parametrize("name", ["gtx-1080", "", "9", "9.0.1", "-9.0"])
def test_unknown_cards_list_the_known(name):
    with pytest.raises(InputError, match=r"unknown card .*: choose one of v100, t4, .*or a compute capability such as"):
        card(name)


def test_cards_that_torch_has_left_behind():
    with pytest.raises(InputError, match=r"before compute capability 7\.0"):
        card("6.1")
