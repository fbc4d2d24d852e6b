"""The runs that are measured on a card: which they are, and how many run at once."""

import threading
from dataclasses import replace

import pytest

from baselines.registry import CORE, methods
from benchmarks import on_card
from benchmarks.harness.errors import InputError
from benchmarks.harness.predict import predict
from benchmarks.on_card import EDGE_BYTES, GIB, GROUPS, Room, identity, main, measure, specs
from reports.record import Record, read


def test_every_method_runs_and_every_run_differs():
    wanted = specs()
    assert {spec.method for spec in wanted} == {*methods(), "peft:lora"}
    assert {spec.method for spec in wanted if spec.layer == (4096, 11008)} == set(CORE)
    assert len({identity(spec) for spec in wanted}) == len(wanted)
    assert {spec.device for spec in wanted} == {"cuda"}
    assert {spec.gpu for spec in specs(gpu="h100")} == {"h100"}


def test_the_edges_are_pairs():
    edges = specs(["edges"])
    assert {spec.gpu_memory_bytes for spec in edges} == {EDGE_BYTES}
    for fits, more in zip(edges[::2], edges[1::2], strict=True):
        assert replace(fits, batch=fits.batch + 1) == more


def test_an_edge_is_where_the_predictions_have_it():
    fits, more = (
        spec for spec in specs(["edges"], gpu="h100") if spec.model == "tinyllama-1.1b" and spec.method == "lora"
    )
    assert [predict(spec).fits for spec in (fits, more)] == [True, False]


def test_a_run_and_its_record_are_identified_alike():
    for spec in specs(["layers", "modifiers", "decoders"]):
        assert identity(spec) == identity(spec.blank(spec.label(), status="ok"))


def test_room_is_lent_while_there_is_some():
    room, entered = Room(10), []

    def take(name, size):
        with room.lent(size):
            entered.append(name)

    with room.lent(6):
        other = threading.Thread(target=take, args=("five", 5))
        other.start()
        take("four", 4)
        assert entered == ["four"]
    other.join(timeout=10)
    assert entered == ["four", "five"]
    # More than there is: it has all of it for itself.
    take("twenty", 20)
    assert entered[-1] == "twenty"


def test_each_run_is_measured_in_the_room_that_it_needs(monkeypatch):
    wanted = specs(["layers"])[:4]
    lent, done = [], []
    monkeypatch.setattr(Room, "lent", lambda self, size: lent.append(size) or threading.Lock())

    def one(given, reference, tell):
        (spec,) = given
        tell(spec, Record(method=spec.method, model=spec.label()), ())

    monkeypatch.setattr(on_card, "measure_all", one)
    measure(wanted, {identity(wanted[0]): 7}, lambda spec, record, _: done.append((spec, record.method)), 1, 70 * GIB)
    assert done == [(spec, spec.method) for spec in wanted]
    assert lent == [7, 4 * GIB, 4 * GIB, 4 * GIB]


def test_without_a_card_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(
        on_card, "GROUPS", {"layers": ((("lora",), "lora[2]", {"layer": (8, 12), "batch": 1, "seq": 4}),)}
    )
    main(["--json", str(tmp_path / "records.json"), "--only", "layers"])
    (record,) = read(tmp_path / "records.json")
    assert (record.status, record.source) == ("refused", "measured")
    assert "needs an NVIDIA GPU" in record.reason


def test_the_same_runs_are_predicted(tmp_path, monkeypatch):
    monkeypatch.setattr(
        on_card, "GROUPS", {"layers": ((("lora",), "lora[2]", {"layer": (8, 12), "batch": 1, "seq": 4}),)}
    )
    path = tmp_path / "records.json"
    main(["--json", str(path), "--only", "layers", "--predict", "--jobs", "1"])
    (record,) = read(path)
    assert (record.status, record.source, record.gpu, record.label) == ("ok", "predicted", "h100", "lora[2]")
    # It need not be measured again, and there is nothing else.
    main(["--json", str(tmp_path / "more.json"), "--only", "layers", "--skip", str(path)])
    assert not (tmp_path / "more.json").exists()


def test_an_unknown_group_lists_the_known_ones(tmp_path):
    with pytest.raises(InputError, match=r"no group 'lairs'.*layers"):
        main(["--json", str(tmp_path / "records.json"), "--only", "layers,lairs"])
    assert "layers" in GROUPS
