"""What the claim reads of the measurement of the sparse space: ratios, the target, and sentences by arithmetic."""

import json

import pytest

from benchmarks.claim import space
from benchmarks.harness.errors import InputError

DENSITIES = [0.01, 0.1]


def energy(kind, name, shares, training="none", step=0, task="t"):
    """A row for each layer: the share that 1 % hold, and one more tenth of all in ten times as many entries."""
    where = {"task": task, "training": training, "step": step, "kind": kind, "space": name}
    return [{**where, "layer": n, "kept": [share, share + 0.1]} for n, share in enumerate(shares, start=1)]


def start(up, down):
    """Two layers of each kind in every space: `up` and `down` are shares in the basis, those of G are 0.2 and 0.4."""
    rows = []
    for kind, shares in (("up", up), ("down", down)):
        rows += energy(kind, "basis", shares) + energy(kind, "raw", [0.2, 0.4])
        for name, share in (("V alone", 0.1), ("U transposed", 0.15), ("V transposed", 0.25), ("random", 0.05)):
            rows += energy(kind, name, [share, share])
        rows += energy(kind, "U alone", [0.4, 0.4])
    return rows


def later(training, old, new):
    """At step 8 G itself holds 0.5."""
    rows = []
    for kind in ("up", "down"):
        rows += energy(kind, "raw", [0.5, 0.5], training, 8)
        rows += energy(kind, "basis", [old, old], training, 8)
        rows += energy(kind, "basis made anew", [new, new], training, 8)
    return rows


def counted(padded, layer, **counts):
    blank = {"tokens": 100, "padding": 20, "zero": 20, "zero_padding": 20, "below_1_pct": 8, "below_10_pct": 40}
    where = {"task": "t", "training": "none", "step": 0, "padded": padded, "kind": "up", "layer": layer}
    return {**where, **blank, **counts}


def measured(rows):
    return {
        "settings": {},
        "environment": {},
        "densities": DENSITIES,
        "energy": rows,
        "zero_rows": [
            counted("to the longest text", 1),
            counted("to the longest text", 2, zero=60),
            counted("to 128 tokens", 1, tokens=200, padding=120, zero=120, zero_padding=120),
            counted("to 128 tokens", 2, tokens=200, padding=120, zero=160, zero_padding=120),
        ],
    }


def test_ratios_are_of_means_over_layers():
    found = space.judge(measured(start(up=[0.3, 0.6], down=[0.8, 0.7])))
    up, down = found["kinds"]
    assert (up["kind"], down["kind"]) == ("up", "down")
    assert up["ratio"] == pytest.approx(0.45 / 0.3)
    assert down["ratio"] == pytest.approx(0.75 / 0.3)
    assert (down["least"], down["most"]) == pytest.approx((0.7 / 0.4, 0.8 / 0.2))
    (target,) = found["targets"]
    assert target["ratio"] == pytest.approx((1.5 + 2.5) / 2)
    assert target["anew"] is None
    assert "2.00 on t (up 1.50, down 2.50), which meets the target" in found["findings"][0]
    # 45 and 75 % on the mean of the layers, 30 to 80 % by layer; a tenth more in ten times as many.
    assert (
        "45 to 75 % of the energy by task and kind, 30 to 80 % by layer, and the largest 10 % 40 to 90 %"
        in (found["findings"][1])
    )


@pytest.mark.parametrize(
    ("up", "down", "met"),
    [
        (0.31, 0.5, True),  # 1.03 and 1.67: 1.35 on the mean
        (0.30, 0.9, False),  # no more than G itself
        (0.38, 0.39, False),  # 1.27 and 1.3: 1.28 on the mean
    ],
)
def test_the_target_is_on_the_mean_and_on_each_kind(up, down, met):
    found = space.judge(measured(start(up=[up, up], down=[down, down])))
    assert found["targets"][0]["met"] is met
    assert f"on {int(met)} of 1 tasks" in found["sentence"]
    assert ("which meets the target" in found["findings"][0]) is met


def test_one_rotation_alone_is_said_where_it_does_as_well():
    both = space.judge(measured(start(up=[0.39, 0.39], down=[0.8, 0.8])))["findings"][2]
    assert both.startswith("One rotation alone holds as much as both or more: U alone on t, up (40.0 against 39.0 %).")
    assert "one factor transposed the largest 1 % hold 15 to 25 %, after random rotations 5 %" in both
    neither = space.judge(measured(start(up=[0.5, 0.5], down=[0.8, 0.8])))["findings"][2]
    assert neither.startswith("Both rotations together hold more than either alone")


def test_bases_of_the_start_and_new_ones_when_training_ends():
    rows = start(up=[0.8, 0.8], down=[0.8, 0.8])
    rows += later("full", old=0.45, new=0.75) + later("sparsegrad", old=0.7, new=0.6)
    # A moment before the end counts for nothing here.
    rows += [{**row, "step": 4, "kept": [0.9, 1.0]} for row in later("full", 1, 1) if row["space"] != "raw"]
    rows += [{**row, "step": 4} for row in later("full", 1, 1) if row["space"] == "raw"]
    found = space.judge(measured(rows))
    assert (
        "0.90 (t, full), 1.40 (t, sparsegrad) in those of the start, and 1.20 to 1.50 in bases" in found["findings"][3]
    )
    assert (
        "in 1 of 2 cases with the bases of the start, which are those that the method has, and in 1 of 2 with"
        in found["sentence"]
    )


def test_rows_of_dy_that_are_padding_and_those_that_are_not():
    *_, zero, text = space.judge(measured(start(up=[0.5, 0.5], down=[0.5, 0.5])))["findings"]
    # 80 of 200 rows, 40 of them padding; 280 of 400, 240 of them padding.
    assert "40 % with batches padded to the longest text, of which 50 % are padding" in zero
    assert "70 % with batches padded to 128 tokens, of which 86 % are padding" in zero
    # Of the last layer's 160 rows of text 80 are zero; of the first's 8 of 80 are small.
    assert "none are zero in the layers before the last, and 50 % in the last" in text
    assert "10 % on t have at most 1 % of the largest norm" in text


def test_what_was_not_measured_is_none_and_what_cannot_be_read_is_refused(tmp_path):
    assert space.judge(space.read(tmp_path / "none.json")) is None
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        space.read(tmp_path / "broken.json")
    whole = measured(start(up=[0.5, 0.5], down=[0.5, 0.5]))
    for part in ("densities", "energy", "zero_rows", "settings"):
        with pytest.raises(InputError, match="lacks what the claim reads"):
            space.judge({name: value for name, value in whole.items() if name != part})
    with pytest.raises(InputError, match="lacks what the claim reads"):
        space.judge({**whole, "energy": []})


def test_the_committed_measurement_is_whole_and_small():
    assert space.SPACE.stat().st_size < 100_000
    found = space.judge(space.read())
    assert found["settings"]["model"] == "minilm-l6"
    assert {row["kind"] for row in found["kinds"]} == {"up", "down"}
    layers = {
        (row["task"], row["training"], row["step"], row["kind"], row["space"], row["layer"]) for row in found["energy"]
    }
    assert (
        len(layers) == len(found["energy"]) == 2 * 2 * 6 * (7 + 4 * 3)
    )  # tasks, kinds, layers, start and four moments
    assert all(
        0 < low <= high <= 1 for row in found["energy"] for low, high in zip(row["kept"], row["kept"][1:], strict=False)
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == found
