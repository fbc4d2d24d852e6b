"""Files that somebody else wrote: bounded, strict, and never waited for."""

import json
import os
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from reports import reading
from reports.reading import MOST_BYTES, misfit, open_file, parse, read_text, shown


def test_a_file_is_read_up_to_the_limit_and_not_beyond(tmp_path, monkeypatch):
    path = tmp_path / "it"
    monkeypatch.setattr(reading, "MOST_BYTES", 2**20)
    for size, fits in ((2**20, True), (2**20 + 1, False)):
        path.write_bytes(b"x" * size)
        if fits:
            assert len(read_text(path)) == size
            continue
        with pytest.raises(ValueError, match="more than 1 MiB"):
            read_text(path)
        # What the system makes as it is read says no size.
        monkeypatch.setattr(reading.os, "fstat", lambda handle: SimpleNamespace(st_size=0))
        with pytest.raises(ValueError, match="more than 1 MiB"):
            read_text(path)


def test_what_is_too_large_is_not_read_at_all(tmp_path, monkeypatch):
    path = tmp_path / "it"
    path.touch()
    os.truncate(path, 200 * 2**20)

    class Unread:
        def __init__(self, file):
            self.fileno, self.read = file.fileno, lambda *_: pytest.fail("read all the same")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(reading, "open_file", lambda path: Unread(open_file(path)))
    with pytest.raises(ValueError, match=f"more than {MOST_BYTES // 2**20} MiB; give smaller files"):
        read_text(path)


@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "absent", "link to a pipe"])
def test_what_is_no_file_is_not_waited_for(kind, tmp_path):
    path = tmp_path / "it"
    if "pipe" in kind:
        os.mkfifo(path)
    if kind == "directory":
        path.mkdir()
    if kind == "link to a pipe":
        path = tmp_path / "link"
        path.symlink_to("it")
    with pytest.raises(OSError, match="No such file" if kind == "absent" else "not a regular file") as error:
        read_text("/dev/zero" if kind == "device" else path)
    assert error.value.filename == ("/dev/zero" if kind == "device" else str(path))


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "it").write_bytes(b"[\xff]")
    with pytest.raises(ValueError, match="can't decode byte 0xff"):
        read_text(tmp_path / "it")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": 2, "b": 2}', "the key 'b' stands twice"),
        ('[{"x": {"a": 1, "a": 2}}]', "the key 'a' stands twice"),
        (json.dumps({"k" * 10**5: 1})[:-1] + f', "{"k" * 10**5}": 2}}', r"the key 'k+\.\.\.k+' stands twice"),
        ("[" * 10**5, "nested too deeply"),
        ('{"a":' * 10**5, "nested too deeply"),
        ("[NaN]", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("[1", "Expecting"),
        ("", "Expecting"),
        (f"[{'1' * 5000}]", "limit"),
    ],
)
def test_what_is_no_json(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(text)
    assert len(str(error.value)) < 300


def test_foreign_json_may_have_nan():
    (found,) = parse("[NaN]", allow_nan=True)
    assert found != found


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, [1] * 10**6, {str(i): i for i in range(1000)}, 10**4000, json.loads("[" * 500 + "]" * 500)],
    ids=["text", "list", "object", "number", "nested"],
)
def test_a_value_is_shown_cut_short(value):
    assert len(shown(value)) < 200


@dataclass
class Fields:
    whole: int = 1
    real: float | None = 1.5
    word: str = ""
    flag: bool = True
    series: tuple[float, ...] = (1, 2.5)
    points: tuple[tuple[int, float], ...] = ((1, 2.5),)
    facts: dict[str, int | str | None] | None = None


@pytest.mark.parametrize(
    "values",
    [
        {"whole": True},
        {"whole": 1.0},
        {"whole": None},
        {"real": True},
        {"real": "1"},
        {"real": float("nan")},
        {"real": float("-inf")},
        {"real": 10**309},
        {"word": None},
        {"word": b""},
        {"flag": 1},
        {"flag": None},
        {"series": [1.0]},
        {"series": (1.0, None)},
        {"series": (1.0, float("inf"))},
        {"points": ((1, 2.5), (1,))},
        {"points": ((1.5, 2.5),)},
        {"points": (3,)},
        {"facts": {"a": []}},
        {"facts": ()},
    ],
)
def test_the_field_whose_value_is_not_of_its_type_is_named(values):
    (name,) = values
    assert misfit(Fields()) is None
    assert misfit(Fields(**values)).startswith(f"field '{name}' must be ")


def test_what_fits():
    assert (
        misfit(Fields(whole=-(10**40), real=10**308, series=(), points=(), facts={"a": None, "b": 1, "c": ""})) is None
    )
    assert misfit(Fields(real=None)) is None
