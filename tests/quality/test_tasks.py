"""The study's tasks: nothing is shared between their parts, a seed decides all, and a workload reads every example."""

import functools
import hashlib
import itertools
import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.harness import text
from benchmarks.harness.errors import InputError
from benchmarks.harness.models import resolve
from benchmarks.harness.protocol import Diverged
from benchmarks.quality import tasks
from benchmarks.quality.study import CORE_TASKS
from benchmarks.quality.tasks import TaskWorkload, load_task

task_of = functools.cache(load_task)


def parts(data):
    return data.test, data.validation, data.train


def words(example):
    return tuple(re.findall(r"[a-z0-9]+", example.text.lower())) or example.text


@pytest.mark.parametrize("name", CORE_TASKS)
def test_the_split(name):
    data = task_of(name).data
    whole = [example for part in parts(text.load(name)) for example in part]
    assert [len(part) for part in parts(data)] == [1000, 400, len(whole) - 1400]
    assert Counter(example for part in parts(data) for example in part) == Counter(whole)
    test, validation, pool = ({words(example) for example in part} for part in parts(data))
    assert not test & validation
    assert not test & pool
    assert not validation & pool


def test_both_labellings_of_trec_have_the_same_texts_in_the_same_order():
    coarse, fine = task_of("trec"), task_of("trec-fine")
    for some, others in zip(parts(coarse.data), parts(fine.data), strict=True):
        assert [example.text for example in some] == [example.text for example in others]
    assert [e.text for e in coarse.training_set(50, 3)] == [e.text for e in fine.training_set(50, 3)]
    assert coarse.data.num_labels < fine.data.num_labels


def test_metrics():
    found = {name: task_of(name).metric for name in CORE_TASKS}
    assert [name for name, metric in found.items() if metric == "pearson"] == ["amazon", "nyt", "tweets"]
    assert set(found.values()) == {"accuracy", "pearson"}


def test_a_published_evaluation_split_stays_as_it_is(monkeypatch):
    examples = [tuple(text.Example(f"{part} {i}", i % 2, "pair") for i in range(5)) for part in "abc"]
    data = text.TextData("glue/rte", *examples, label_names=("no", "yes"), source="")
    monkeypatch.setattr(text, "load", lambda name, hub: data)
    assert load_task("glue/rte", hub=True).data == data


# --- what a seed draws


def test_a_training_set_follows_from_the_seed_alone():
    random.seed(1)
    first = task_of("amazon").training_set(300, 5)
    random.seed(2)
    again = load_task("amazon").training_set(300, 5)
    assert first == again
    assert len(first) == len(set(first)) == 300
    assert set(first) <= set(task_of("amazon").data.train)
    other = task_of("amazon").training_set(300, 6)
    # Two draws of 300 out of 2,297 share 39 examples on average, with a standard deviation below 6.
    assert len(set(first) & set(other)) < 39 + 5 * 6
    assert task_of("amazon").training_set(20, 5) == first[:20]


def test_the_whole_pool():
    pool = task_of("amazon").data.train
    whole = task_of("amazon").training_set(None, 0)
    assert whole != pool
    assert Counter(whole) == Counter(pool) == Counter(task_of("amazon").training_set(len(pool), 0))
    assert task_of("amazon").data.train == load_task("amazon").data.train  # not shuffled in place


@pytest.mark.parametrize("size", [-1, 0, 2298])
def test_a_training_set_that_cannot_be_drawn(size):
    assert len(task_of("amazon").data.train) == 2297
    with pytest.raises(InputError, match=rf"^amazon has a pool of 2297 examples: a training set of {size} "):
        task_of("amazon").training_set(size, 0)


def test_seeds_of_different_texts_have_nothing_in_common():
    seeds = {(task_of(name).group, n): task_of(name).seed(n) for name in CORE_TASKS for n in range(100)}
    assert len(seeds) == len(set(seeds.values())) == 500  # five texts
    assert all(0 <= seed < 2**32 for seed in seeds.values())
    assert [task_of("trec").seed(n) for n in range(9)] == [task_of("trec-fine").seed(n) for n in range(9)]
    # Results can be repeated as long as this stays.
    assert task_of("nyt").seed(7) == int(hashlib.sha256(b"2:nyt:7").hexdigest()[:8], 16)


# --- batches


SEQ = 24


def workload(model, name="amazon", size=150, seed=0, batch=8, **options):
    task = task_of(name)
    common = {"seq": SEQ, "dtype": "float32", "device": "cpu", "targets": "mlp"}
    return TaskWorkload(
        task, task.training_set(size, seed), resolve(model), batch=batch, seed=seed, **common, **options
    )


def epoch(batches, size=150, batch=8):
    return list(itertools.islice(batches, -(-size // batch)))


def rows(batch):
    """(tokens without padding, label) of each example of a batch."""
    lengths = batch["attention_mask"].sum(1).tolist()
    examples = zip(batch["input_ids"].tolist(), lengths, batch["labels"].tolist(), strict=True)
    return [(tuple(ids[:n]), round(label, 5)) for ids, n, label in examples]


def same(some, others):
    pairs = zip(some, others, strict=True)
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)


@pytest.mark.parametrize("name", ["amazon", "trec"])
def test_an_epoch_has_every_example_once(model, name):
    it = workload(model, name)
    labels = np.array([example.label for example in it.text.train], dtype=float)
    if name == "amazon":
        labels = (labels - labels.mean()) / labels.std()
    encode = it.tokenizer
    expected = Counter(
        (tuple(encode(example.text, truncation=True, max_length=SEQ)["input_ids"]), round(label, 5))
        for example, label in zip(it.text.train, labels.astype(np.float32).tolist(), strict=True)
    )
    batches = it.batches()
    first, second = epoch(batches), epoch(batches)
    for each in (first, second):
        assert Counter(row for batch in each for row in rows(batch)) == expected
        assert sorted(len(batch["labels"]) for batch in each) == [6, *[8] * 18]
    assert not same(first, second)
    assert {batch["labels"].dtype for batch in first} == {torch.float32 if name == "amazon" else torch.int64}


def test_a_batch_is_padded_to_its_longest_text(model):
    it = workload(model)
    widths = set()
    for batch in epoch(it.batches()):
        mask = batch["attention_mask"]
        assert mask.shape == batch["input_ids"].shape
        assert mask.sum(1).max() == mask.shape[1] <= SEQ
        assert (batch["input_ids"][mask == 0] == it.tokenizer.pad_token_id).all()
        widths.add(mask.shape[1])
    assert SEQ in widths  # some texts are cut off
    assert min(widths) < SEQ / 2


def test_texts_of_a_window_are_batched_by_length(model):
    size = tasks.WINDOW * 8  # one window
    lengths = [batch["attention_mask"].sum(1) for batch in epoch(workload(model, size=size).batches(), size)]
    ranges = sorted((n.min().item(), n.max().item()) for n in lengths)
    assert all(longest <= shortest for (_, longest), (shortest, _) in itertools.pairwise(ranges))
    assert [n.max().item() for n in lengths] != sorted(n.max().item() for n in lengths)  # but in a random order


def test_the_order_of_batches_is_the_seeds(model):
    it = workload(model)
    random.seed(4)
    torch.manual_seed(4)
    first = epoch(it.batches())
    assert same(first, epoch(it.batches()))  # as the preparation and the training each read them
    assert same(first, epoch(workload(model).batches()))
    again = workload(model)
    again.seed = 1  # with the same training set
    assert not same(first, epoch(again.batches()))


def test_ratings_are_standardised(model):
    labels = torch.cat([batch["labels"] for batch in epoch(workload(model).batches())]).double()
    assert labels.mean().item() == pytest.approx(0, abs=1e-6)
    assert labels.std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_ratings_that_are_all_the_same(model):
    alike = tuple(text.Example(f"text {i}", 2.5) for i in range(5))
    it = TaskWorkload(
        task_of("amazon"),
        alike,
        resolve(model),
        batch=2,
        seq=SEQ,
        dtype="float32",
        device="cpu",
        seed=0,
        targets="mlp",
    )
    assert all((batch["labels"] == 0).all() for batch in epoch(it.batches(), 5, 2))


# --- predictions


@pytest.mark.parametrize("name", ["amazon", "trec"])
def test_predictions_are_those_of_each_text_alone(model, name):
    it = workload(model, name, size=40)
    network = it.build()
    examples = task_of(name).data.validation[: tasks.EVALUATION_BATCH + 6]

    def alone(example):
        tokens = it.tokenizer(example.text, truncation=True, max_length=SEQ, return_tensors="pt")
        return network.eval()(**tokens).logits[0]

    with torch.no_grad():
        # A new head gives all texts about the same: without that, classes differ.
        network.classifier.bias -= torch.stack([alone(example) for example in examples]).mean(0)
        one_by_one = [alone(example) for example in examples]
    found = it.predictions(network.train(), examples)
    assert network.training
    if name == "amazon":
        ratings = np.array([example.label for example in it.text.train])
        expected = [ratings.mean() + ratings.std() * logits.item() for logits in one_by_one]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert found.dtype == np.float64
    else:
        assert found.tolist() == [logits.argmax().item() for logits in one_by_one]
        assert found.dtype == np.int64
    assert len(set(found.round(4).tolist())) > 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite(model, value):
    it = workload(model, size=10)
    network = it.build()
    torch.nn.init.constant_(network.classifier.bias, value)
    with pytest.raises(Diverged):
        it.predictions(network, task_of("amazon").data.validation[:3])


# --- models that a study cannot train

DECODER = {
    "model_type": "llama",
    "vocab_size": 30522,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("kind", ["decoder", "encoder without a tokenizer"])
def test_no_encoder_with_a_tokenizer(model, tmp_path, kind):
    if kind == "decoder":
        (tmp_path / "config.json").write_text(json.dumps(DECODER))
        shutil.copy(Path(model) / "tokenizer.json", tmp_path)
        assert resolve(str(tmp_path)).tokenizer() is not None
    else:
        shutil.copy(Path(model) / "config.json", tmp_path)
        assert resolve(str(tmp_path)).kind == "encoder"
    with pytest.raises(InputError, match=f"^{tmp_path} is no encoder with a tokenizer"):
        workload(str(tmp_path), size=4)
