"""Results files are data: whatever one holds, each command that reads it says what is wrong, and nothing runs it."""

import ast
import json
import os
from pathlib import Path

import pytest

from benchmarks import cli
from benchmarks.claim import command as claim
from benchmarks.harness.errors import InputError
from benchmarks.journal import Journal
from benchmarks.quality import command as quality
from reports import page
from reports.record import Record, dumps, write

ROOT = Path(__file__).parents[1]
ROOMS = ("sparsegrad", "baselines", "benchmarks", "reports")
# Modules that run what they read, and names that do.
RUNNERS = (
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "yaml",
    "runpy",
    "code",
)
RECORD = json.loads(dumps([Record(method="lora", model="m")]))[0]


def sparse(path):
    path.touch()
    os.truncate(path, 200 * 2**20)


MADE = {
    "a pipe": os.mkfifo,
    "a directory": Path.mkdir,
    "200 MiB": sparse,
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 99),
    "nested": lambda path: path.write_text("[" * 10**5 + "\n"),
    "a key twice": lambda path: path.write_text('{"benchmarks": [], "benchmarks": []}\n'),
    "a pickle": lambda path: path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.\n"),
    "empty of sense": lambda path: path.write_text("3\n"),
}


def report(path):
    return cli.main(["report", str(path), "--out", "out"])


def claimed(path):
    return cli.main(["claim", "--quality", str(path), "--out", "out"])


def resumed_study(path):
    (path.parent / "out").mkdir()
    path.rename(path.parent / "out" / quality.RUNS)
    return cli.main(["quality", "--out", "out"])


def compared(path):
    return cli.main(["compare", str(path), str(path)])


def bounded(path):
    write([Record(method="lora", model="m")], "records.json")
    return cli.main(["compare", "records.json", "records.json", "--thresholds", str(path)])


def appended(path):
    write([Record(method="lora", model="m", commit="c")], "records.json")
    return cli.main(["compare", "records.json", "records.json", "--history", str(path)])


def drawn(path):
    return cli.main(["report", "--history", str(path), "--out", "out"])


READERS = (report, claimed, resumed_study, compared, bounded, appended, drawn)


@pytest.fixture(autouse=True)
def nothing_begins(tmp_path, monkeypatch):
    for module, name in ((quality, "run_all"), (quality, "records"), (claim, "gather"), (page, "write_report")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("began all the same"))
    monkeypatch.setattr(quality, "_check_workloads", lambda study: None)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("made", MADE)
def test_a_file_that_holds_something_else(made, read, tmp_path, capsys):
    path = tmp_path / "file"
    MADE[made](path)
    assert read(path) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sparsegrad-bench: ")
    assert err.count("\n") == 1
    assert (quality.RUNS if read is resumed_study else "file") in err
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("made", MADE)
def test_a_suite_does_not_go_on_from_a_file_that_holds_something_else(made, tmp_path):
    MADE[made](tmp_path / "out.partial.json")
    with pytest.raises(InputError, match=r"--resume: .*out\.partial\.json is not a suite's results"):
        Journal(tmp_path / "out.json").resume()


@pytest.mark.parametrize("seconds", ["NaN", "Infinity", "1e400", "-1", "true", '"1"', "null", "1" + "0" * 400, "[]"])
def test_a_suite_does_not_go_on_with_times_that_are_none(seconds, tmp_path):
    entry = f'{{"fullname": "it", "stats": {{"data": [0.5, {seconds}]}}, "extra_info": {json.dumps(RECORD)}}}'
    (tmp_path / "out.json").write_text(f'{{"benchmarks": [{entry}]}}')
    with pytest.raises(InputError, match="is no time of a step"):
        Journal(tmp_path / "out.json").resume()


def test_a_long_line_of_a_ledger_is_not_read_whole(tmp_path, capsys):
    # Without an end it could be a line that was cut off, and is not taken for one.
    sparse(tmp_path / "file")
    assert resumed_study(tmp_path / "file") == 2
    assert "line 1, is not of a study's runs: it has more than 64 MiB" in capsys.readouterr().err
    assert (tmp_path / "out" / quality.RUNS).stat().st_size == 200 * 2**20


@pytest.mark.parametrize("made", ["binary", "nested", "a key twice", "a pickle", "empty of sense"])
def test_a_file_that_is_no_history_is_not_written_into(made, tmp_path):
    MADE[made](tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    assert appended(tmp_path / "file") == 2
    assert (tmp_path / "file").read_bytes() == before


def test_where_a_device_or_pipe_is_no_file_is_written(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/null", "pipe"):
        assert cli.main(["predict", "--layer", "2x3", "--methods", "full", "--json", path]) == 2
        assert f"--json {path} cannot be written: it is not a regular file" in capsys.readouterr().err


def sources():
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def runs_what_it_reads(tree):
    """Where a syntax tree imports or calls what runs the content of files."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in RUNNERS]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").partition(".")[0] in RUNNERS else []
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            unsafe_load = name.endswith("torch.load") and given.get("weights_only") != "True"
            pickled = (
                given.get("allow_pickle", "False") != "False" or given.get("trust_remote_code", "False") != "False"
            )
            if name in ("eval", "exec", "compile") or name.endswith("read_pickle") or unsafe_load or pickled:
                found.append(name)
    return found


def test_nothing_that_is_read_is_run():
    assert len(sources()) > 100
    assert {str(path): found for path in sources() if (found := runs_what_it_reads(ast.parse(path.read_text())))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from yaml import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "pandas.read_pickle(path)",
        "eval(text)",
    ],
)
def test_what_would_run_it_is_found(line):
    assert len(runs_what_it_reads(ast.parse(line))) == 1
    assert runs_what_it_reads(ast.parse("torch.load(path, weights_only=True)")) == []
