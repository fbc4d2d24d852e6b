"""What all tests share."""

import gc

import pytest


@pytest.fixture(autouse=True)
def short_collections():
    """The garbage collections that a run begins with need not look at what other tests left alive."""
    gc.freeze()
    yield
    gc.unfreeze()
