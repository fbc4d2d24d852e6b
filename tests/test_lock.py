"""Two commands on one place: the second is told who has it, and nobody is kept out by the dead."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from benchmarks import cli, lock
from benchmarks.claim import command as claim
from benchmarks.harness import turns
from benchmarks.harness.errors import InputError
from benchmarks.lock import held
from benchmarks.quality import command as quality
from reports import page
from reports.record import Record, write

HOLD = """
import sys
from pathlib import Path
from benchmarks.lock import held
with held(Path(sys.argv[1]), "--out"):
    print("held", flush=True)
    sys.stdin.read()
"""
# Takes the lock over and over; what it makes while it has it must not be there yet.
CONTEND = """
import os, sys
from pathlib import Path
from benchmarks.harness.errors import InputError
from benchmarks.lock import held
path, taken = Path(sys.argv[1]), 0
while taken < 30:
    try:
        with held(path, "--out"):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            path.unlink()
            taken += 1
    except InputError:
        pass
"""


def start(code, path):
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_whoever_comes_second_is_told_who_has_it_until_that_one_dies(tmp_path):
    path = tmp_path / "new" / "runs.jsonl"
    holder = start(HOLD, path)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError) as error, held(path, "--out"):
        pass
    assert str(error.value) == (
        f"{path} is being written by process {holder.pid}: wait until that has ended, or choose another --out"
    )
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with held(path, "--out"):
        pass
    assert list(path.parent.iterdir()) == []


def test_one_holds_it_at_a_time(tmp_path):
    contenders = [start(CONTEND, tmp_path / "it") for _ in range(3)]
    assert [(each.wait(60), each.communicate()[0]) for each in contenders] == [(0, "")] * 3
    assert list(tmp_path.iterdir()) == []


def test_it_is_let_go_whatever_happens_meanwhile(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), held(tmp_path / "it", "--out"):
            raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_other_files_of_a_folder_are_free(tmp_path):
    with held(tmp_path / "a.json", "--json"), held(tmp_path / "b.json", "--json"):
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [".a.json.lock", ".b.json.lock"]


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".it.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic link"), held(tmp_path / "it", "--out"):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_system_without_locks_goes_without(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with held(tmp_path / "it", "--out"), held(tmp_path / "it", "--out"):
        pass
    monkeypatch.setattr(lock, "fcntl", None)
    with held(tmp_path / "it", "--out"), held(tmp_path / "it", "--out"):
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("held_file", "arguments", "option"),
    [
        ("runs.jsonl", ["quality", "--out", "here", "--arms", "head"], "--out"),
        ("index.html", ["claim", "--quick", "--out", "here"], "--out"),
        ("index.html", ["report", "records.json", "--out", "here"], "--out"),
        ("it.jsonl", ["compare", "records.json", "records.json", "--history", "here/it.jsonl"], "--history"),
        ("out.json", ["run", "--layer", "2x3", "--methods", "full", "--json", "here/out.json"], "--json"),
        ("out.json", ["predict", "--layer", "2x3", "--methods", "full", "--json", "here/out.json"], "--json"),
    ],
)
def test_a_command_in_the_place_of_another(held_file, arguments, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for module, name in ((quality, "records"), (claim, "gather"), (page, "write_report"), (turns, "measure_all")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("began all the same"))
    monkeypatch.setattr(quality, "_check_workloads", lambda study: None)
    write([Record(method="full", model="m")], tmp_path / "records.json")
    with held(tmp_path / "here" / held_file, "--out"):
        assert cli.main(arguments) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err == (
        f"sparsegrad-bench: here/{held_file} is being written by process {os.getpid()}: wait until that has ended, or "
        f"choose another {option}"
    )
