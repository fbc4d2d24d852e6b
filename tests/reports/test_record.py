import csv
import io
import json
import subprocess
import sys
import typing
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports import record
from reports.record import BREAKDOWN, Record, RecordError
from reports.timeline import MOST_SAMPLES, Timeline

# One value of each type a field may have; a field that is checked further gets its own.
SAMPLES = {int: 12345678901, float: 0.1 + 0.2, str: 'text, "quoted"\nand <b>', bool: True}
CHOSEN = {
    "budget": 0.01,
    "status": "killed",
    "source": "predicted",
    "device_semantics": "cuda",
    "train_rest": "none",
    "schema_version": record.SCHEMA_VERSION,
    "pairing": "rounds",
    "timeline": Timeline(
        phases=(("forward", 0), ("backward", 2)),
        at=(0, 1, 3),
        by_category=dict.fromkeys(record.BREAKDOWN, (0, 5, 10**19)),
    ).dumps(),
}


def filled() -> Record:
    """A record in which no field has its default."""
    values = {}
    for name, hint in typing.get_type_hints(Record).items():
        kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
        values[name] = CHOSEN.get(name, SAMPLES[kinds[0]])
    return Record(**values)


RECORDS = {
    "least": Record(method="full", model="m"),
    "filled": filled(),
    "zeros": Record(method="full", model="m", resident_bytes=0, touched_params=0, step_time_s=0.0),
    "unmatched": Record(method="full", model="m", matched=False),
    "negative workspace": Record(method="full", model="m", kernel_workspace_bytes=-4096),
    "integer budget": Record(method="lora", model="m", budget=7),
    "density": Record(method="sparsegrad", model="m", budget=0.01),
    "whole density": Record(method="sparsegrad", model="m", budget=1.0),
    "core": Record(method="sparsegrad-core", model="m", budget="82x326"),
    "huge": Record(method="full", model="m", resident_bytes=10**40),
    "a carriage return": Record(method="full", model="m", reason="one\rtwo"),
    "markup": Record(method="<script>", model="é, \r\n\t表", status="crashed", reason="\"'&"),
}


def types_of(one: Record) -> list[type]:
    return [type(value) for value in one.to_dict().values()]


def timeline_of(sizes: list[int]) -> str:
    return Timeline((("forward", 0),), tuple(range(len(sizes))), dict.fromkeys(BREAKDOWN, tuple(sizes))).dumps()


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
# A NUL is replaced in a CSV, and there an empty text stands for none.
VALUES = {
    int: st.integers(0, 10**40),
    float: NUMBERS.map(abs),
    str: st.text(min_size=1).filter(lambda text: "\0" not in text),
    bool: st.booleans(),
    type(None): st.none(),
}
CHECKED = {
    "budget": st.integers() | NUMBERS | st.from_regex(r"\A[0-9]{1,4}x[0-9]{1,4}\Z") | st.none(),
    "kernel_workspace_bytes": st.integers(),
    "status": st.sampled_from(record.STATUSES),
    "source": st.sampled_from(record.SOURCES),
    "device_semantics": st.sampled_from(record.SEMANTICS),
    "train_rest": st.sampled_from(("all", "none")),
    "pairing": st.sampled_from((None, *record.PAIRINGS)),
    "schema_version": st.just(record.SCHEMA_VERSION),
    "timeline": st.lists(st.integers(0, 10**20), min_size=1, max_size=4).map(timeline_of),
}


FIELDS = {
    name: CHECKED[name] if name in CHECKED else st.one_of([VALUES[kind] for kind in typing.get_args(hint) or (hint,)])
    for name, hint in typing.get_type_hints(Record).items()
}


@st.composite
def some_records(draw) -> list[Record]:
    """Up to three, each with up to six fields that differ from the least record's."""
    found = []
    for _ in range(draw(st.integers(0, 3))):
        values = {"method": "full", "model": "m"}
        for name in draw(st.lists(st.sampled_from(list(FIELDS)), max_size=6)):
            values[name] = draw(FIELDS[name])
        found.append(Record(**values))
    return found


@settings(max_examples=120, derandomize=True, deadline=None, database=None)
@given(some_records())
def test_json_and_csv_keep_values_and_types_but_a_csv_no_timeline(records):
    again = record.loads(record.dumps(records))
    assert again == records
    assert [types_of(one) for one in again] == [types_of(one) for one in records]
    scalar = [replace(one, timeline=None) for one in records]
    again = record.from_csv(record.to_csv(records))
    assert again == scalar
    assert [types_of(one) for one in again] == [types_of(one) for one in scalar]


def test_filled_record_leaves_no_field_at_none():
    assert None not in filled().to_dict().values()


@pytest.mark.parametrize("records", [[], list(RECORDS.values())], ids=["none", "many"])
def test_order_and_number_survive(records, tmp_path):
    path = tmp_path / "new" / "results.json"
    record.write(records, path)
    assert record.read(path) == records
    assert record.from_csv(record.to_csv(records)) == [replace(one, timeline=None) for one in records]
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]


def test_json_has_null_where_nothing_was_obtained():
    (entry,) = json.loads(record.dumps([RECORDS["least"]]))
    assert entry["peak_step_bytes"] is None
    (entry,) = json.loads(record.dumps([RECORDS["zeros"]]))
    assert entry["resident_bytes"] == 0


def test_csv_has_an_empty_cell_where_nothing_was_obtained():
    least, zeros = csv.DictReader(io.StringIO(record.to_csv([RECORDS["least"], RECORDS["zeros"]])))
    assert (least["resident_bytes"], zeros["resident_bytes"]) == ("", "0")


def test_json_is_flat():
    (entry,) = json.loads(record.dumps([filled()]))
    assert list(entry) == [field.name for field in fields(Record)]
    assert not any(isinstance(value, list | dict) for value in entry.values())


GOOD = {"method": "lora", "model": "m", "schema_version": record.SCHEMA_VERSION}
BAD = {
    "truncated": (record.dumps([RECORDS["least"]])[:-20], "cut short"),
    "empty": ("", "cut short"),
    "not a list": (json.dumps(GOOD), "JSON list"),
    "not objects": ("[1]", "JSON object"),
    "unknown field": (json.dumps([{**GOOD, "peak_bytes": 1}]), "'peak_bytes'"),
    "no model": (json.dumps([{k: v for k, v in GOOD.items() if k != "model"}]), "'model'"),
    "text for a number": (json.dumps([{**GOOD, "resident_bytes": "12"}]), "'resident_bytes'"),
    "fraction of a byte": (json.dumps([{**GOOD, "resident_bytes": 0.5}]), "'resident_bytes'"),
    "bool for a number": (json.dumps([{**GOOD, "batch": True}]), "'batch'"),
    "number for a bool": (json.dumps([{**GOOD, "matched": 1}]), "'matched'"),
    "bool for a budget": (json.dumps([{**GOOD, "budget": True}]), "'budget'"),
    "null for a name": (json.dumps([{**GOOD, "method": None}]), "'method'"),
    "negative size": (json.dumps([{**GOOD, "resident_bytes": -1}]), "'resident_bytes'"),
    "unknown status": (json.dumps([{**GOOD, "status": "fine"}]), "'status'"),
    "NaN": (json.dumps([{**GOOD, "step_time_s": float("nan")}]), "'step_time_s'"),
    "infinity": (json.dumps([{**GOOD, "lr": float("inf")}]), "'lr'"),
    "number past any float": (json.dumps([GOOD])[:-2] + ', "lr": 1e999}]', "'lr'"),
    "next schema": (json.dumps([{**GOOD, "schema_version": record.SCHEMA_VERSION + 1}]), "schema_version"),
    "no schema": (json.dumps([{"method": "lora", "model": "m"}]), "schema_version"),
}


@pytest.mark.parametrize(("text", "named"), BAD.values(), ids=BAD.keys())
def test_bad_json_is_one_sentence_that_names_the_input_and_the_fault(text, named):
    with pytest.raises(RecordError) as caught:
        record.loads(text, "results.json")
    message = str(caught.value)
    assert message.startswith("results.json")
    assert named in message
    assert "\n" not in message


def test_error_says_which_record():
    with pytest.raises(RecordError, match="record 1:"):
        record.loads(json.dumps([GOOD, {**GOOD, "batch": "8"}]))


@pytest.mark.parametrize("content", [None, b"\xff\xfe["], ids=["absent", "not UTF-8"])
def test_unreadable_file(content, tmp_path):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecordError, match=r"cannot read .*results\.json"):
        record.read(path)


def test_csv_with_a_word_for_a_number():
    text = record.to_csv([replace(RECORDS["least"], batch=31415)]).replace("31415", "many")
    with pytest.raises(RecordError, match="'batch'"):
        record.from_csv(text)


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    record.write([RECORDS["least"]], path)

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(record.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        record.write([], path)
    assert record.read(path) == [RECORDS["least"]]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("budget", "label"), [(None, "lora"), (7, "lora[7]"), (0.01, "lora[0.01]"), ("82x326", "lora[82x326]")]
)
def test_label_is_what_the_command_line_takes(budget, label):
    assert Record(method="lora", model="m", budget=budget).label == label


def test_every_field_has_a_meaning():
    for field in fields(Record):
        assert record.meaning(field.name)


def test_reports_is_a_leaf():
    """No module of the room brings in torch or another room, however it is imported."""
    code = (
        "import importlib, pkgutil, sys, reports\n"
        "names = [m.name for m in pkgutil.walk_packages(reports.__path__, 'reports.')]\n"
        "[importlib.import_module(name) for name in names]\n"
        "print(*sorted({n.split('.')[0] for n in sys.modules} & "
        "{'torch', 'transformers', 'sparsegrad', 'baselines', 'benchmarks'}))\n"
        "print(*names)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    foreign, names = result.stdout.split("\n")[:2]
    assert foreign == ""
    assert {"reports.record", "reports.tables", "reports.figures", "reports.page", "reports.palette"} <= set(
        names.split()
    )


SERIES = dict.fromkeys(BREAKDOWN, (1, 2))


@pytest.mark.parametrize(
    "raw",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        {"phases": [], "at": [0, 1], "by_category": SERIES},
        {"phases": [["forward", 1]], "at": [0, 1], "by_category": SERIES},
        {"phases": [["forward", 0], ["backward", 5], ["optimizer", 4]], "at": [0, 1], "by_category": SERIES},
        {"phases": [["forward"]], "at": [0, 1], "by_category": SERIES},
        {"phases": [["forward", 0]], "at": [], "by_category": dict.fromkeys(BREAKDOWN, ())},
        {"phases": [["forward", 0]], "at": [0, 0], "by_category": SERIES},
        {"phases": [["forward", 0]], "at": [1, 2], "by_category": SERIES},
        {"phases": [["forward", 0]], "at": [0, 1.5], "by_category": SERIES},
        {"phases": [["forward", 0]], "at": [0, True], "by_category": SERIES},
        {"phases": [["forward", 0]], "at": [0, 1, 2], "by_category": SERIES},
        {"phases": [["forward", 0]], "at": [0, 1], "by_category": {**SERIES, "parameter_bytes": [1, -1]}},
        {"phases": [["forward", 0]], "at": [0, 1], "by_category": {**SERIES, "other_bytes": [1, 1]}},
        {"phases": [["forward", 0]], "at": [0, 1], "by_category": {"parameter_bytes": [1, 1]}},
        {
            "phases": [["forward", 0]],
            "at": list(range(MOST_SAMPLES + 1)),
            "by_category": dict.fromkeys(BREAKDOWN, (0,) * (MOST_SAMPLES + 1)),
        },
    ],
)
def test_what_is_not_a_timeline_is_refused(raw):
    text = raw if isinstance(raw, str) else json.dumps(raw)
    with pytest.raises(RecordError, match="field 'timeline'"):
        Record(method="full", model="m", timeline=text)


def test_a_timeline_adds_up():
    series = {name: (0, i) for i, name in enumerate(BREAKDOWN)}
    assert Timeline((("forward", 0),), (0, 7), series).totals == (0, 15)


def benchmarks_of(*extras: object) -> str:
    """pytest-benchmark's JSON as far as it matters here."""
    entries = [{"name": "test_it", "stats": {"min": 1.0}, "extra_info": extra} for extra in extras]
    return json.dumps({"machine_info": {}, "commit_info": {}, "benchmarks": entries, "version": "5.3.1"})


def test_pytest_benchmarks_json_is_read_and_other_benchmarks_in_it_passed_over():
    ours = filled()
    assert record.loads(benchmarks_of({}, ours.to_dict(), {"theirs": 1})) == [ours]
    assert record.loads(benchmarks_of()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (benchmarks_of({}, {"a": 1}), "none of its 2 benchmarks is ours"),
        (benchmarks_of({"schema_version": 99}), "record 0: schema_version 99"),
        ('{"benchmarks": 3}', "must be a JSON list, got int"),
        ('{"benchmarks": ["text", null]}', "none of its 2 benchmarks is ours"),
        ('{"other": []}', "pytest-benchmark's JSON, got dict"),
        (benchmarks_of(filled().to_dict())[:-40], "cut short"),
    ],
)
def test_what_is_not_pytest_benchmarks_json_is_said(text, message):
    with pytest.raises(RecordError, match=message):
        record.loads(text, "out.json")
