"""A tiny encoder with weights and a real tokenizer, and few examples: a training run takes a fraction of a second."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from benchmarks.harness.models import MINILM, resolve
from benchmarks.harness.packaged import locate
from benchmarks.quality import training
from benchmarks.quality.tasks import load_task

CONFIG = {
    "model_type": "bert",
    "vocab_size": 30522,  # the tokenizer's
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,  # with the usual 0.02 a model of this width gives every text the same output
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """The checkpoint's directory."""
    directory = tmp_path_factory.mktemp("tiny")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    source = resolve(str(directory / "config.json"))
    source.build(num_labels=2, dtype=torch.float32, attention="sdpa", seed=0).save_pretrained(directory)
    for name in TOKENIZER_FILES:
        shutil.copy(locate(MINILM, "model") / name, directory)
    return str(directory)


@pytest.fixture(scope="session")
def small_tasks():
    """TREC and amazon with 30 validation and 40 test examples, by name."""
    tasks = {name: load_task(name) for name in ("trec", "amazon")}
    return {
        name: replace(task, data=replace(task.data, validation=task.data.validation[:30], test=task.data.test[:40]))
        for name, task in tasks.items()
    }


@pytest.fixture
def small(monkeypatch, small_tasks):
    """Training runs read the small tasks; a test may put others in their place. The number of threads is put back."""
    tasks = dict(small_tasks)
    monkeypatch.setattr(training, "load_task", lambda name, hub: tasks[name])
    threads = torch.get_num_threads()
    yield tasks
    torch.set_num_threads(threads)
