"""The committed study: its summary is what its runs say, and its README counts them."""

import json
from pathlib import Path

import pytest

from benchmarks.claim.quality import SUMMARY
from benchmarks.quality.ledger import Ledger
from benchmarks.quality.summary import summarise


def leaves(thing, path=()):
    """(path, value) of every number and word in nested JSON."""
    if isinstance(thing, dict | list):
        for key, value in thing.items() if isinstance(thing, dict) else enumerate(thing):
            yield from leaves(value, (*path, key))
    else:
        yield path, thing


def test_the_summary_is_of_the_runs_beside_it():
    runs = SUMMARY.with_name("runs.jsonl")
    made = dict(leaves(json.loads(json.dumps(summarise(Ledger(runs))))))
    committed = dict(leaves(json.loads(SUMMARY.read_text())))
    assert made.keys() == committed.keys()
    numbers = {path for path, value in made.items() if isinstance(value, float)}
    assert {path: value for path, value in made.items() if path not in numbers} == {
        path: value for path, value in committed.items() if path not in numbers
    }
    assert [made[path] for path in numbers] == pytest.approx([committed[path] for path in numbers], rel=1e-6, abs=1e-12)
    readme = (Path(runs).parent / "README.md").read_text()
    assert f"{made['runs', 'settled']} of {made['runs', 'planned']} runs" in readme
