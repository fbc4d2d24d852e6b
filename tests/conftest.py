"""What all tests share, and their order."""

import gc
from pathlib import Path

import pytest

# Files that take longest, the longest first: `make test` gives files to processes in the order in which they are
# collected, and none of these should be begun when the others are done.
LONGEST = ("test_predict", "test_suite", "test_protocol", "test_browser", "test_learning", "test_worker", "test_cli")


def pytest_collection_modifyitems(items):
    """The longest files first, all others as they were."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(Path(item.path).stem, len(LONGEST)))


@pytest.fixture(autouse=True)
def short_collections():
    """The garbage collections that a run begins with need not look at what other tests left alive."""
    gc.freeze()
    yield
    gc.unfreeze()
