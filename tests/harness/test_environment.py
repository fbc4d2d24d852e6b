"""What a number was measured with is in its record: versions, commit, machine, and what the allocators were told."""

import platform
import subprocess
from dataclasses import fields

import pytest
import torch

from benchmarks.harness import environment as module
from benchmarks.harness.environment import allocator, commit, environment
from reports.record import Record


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """An own repository with one commit; runs git in it."""

    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-q", "-m", "one")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return git


def test_the_commit_says_whether_the_code_was_changed(repository, tmp_path):
    head = repository("rev-parse", "HEAD")
    assert len(head) == 40
    assert commit.__wrapped__() == head
    # Results that lie about are no code.
    (tmp_path / "results.json").write_text("[]")
    assert commit.__wrapped__() == head
    (tmp_path / "code.py").write_text("2")
    assert commit.__wrapped__() == f"{head}-dirty"


def test_without_a_repository_or_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit.__wrapped__() is None
    monkeypatch.setenv("PATH", "")
    assert commit.__wrapped__() is None


def test_every_field_on_a_processor():
    found = environment("cpu")
    names = [field.name for field in fields(Record)]
    # The record's last fields, before the schema's version.
    assert list(found) == names[names.index("created_at") : names.index("schema_version")]
    assert found["python_version"] == platform.python_version()
    assert found["torch_version"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["driver"] is None
    assert found["device_name"]
    assert Record(method="full", model="m", **found).device_name == found["device_name"]


def test_a_card_is_named_with_its_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", {"cuda:0": "some card"}.get)
    monkeypatch.setattr(module, "driver_version", lambda: "580.65.06")
    found = environment("cuda:0")
    assert (found["device_name"], found["driver"]) == ("some card", "580.65.06")


@pytest.mark.parametrize(
    "name",
    [
        "MALLOC_MMAP_MAX_",
        "MALLOC_TRIM_THRESHOLD_",
        "MALLOC_ARENA_MAX",
        "GLIBC_TUNABLES",
        "LD_PRELOAD",
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
    ],
)
def test_what_allocators_are_told_is_kept(name):
    assert allocator({"HOME": "/", name: "some:value", "MALLOC": "x", "SECRET_MALLOC_": "x"}) == f"{name}=some:value"


def test_nothing_told_is_nothing():
    assert allocator({"HOME": "/"}) is None
    assert allocator({"MALLOC_B": "2", "MALLOC_A": "1"}) == "MALLOC_A=1 MALLOC_B=2"
