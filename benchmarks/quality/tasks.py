"""The tasks of the quality study, and a training workload that reads one of them.

Each data set is split once in a protocol, by the words of its texts (benchmarks/harness/text.py): the test examples,
then the validation examples, and all others are the pool from which each seed draws its training set.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import models, text
from benchmarks.harness.errors import InputError
from benchmarks.harness.protocol import Diverged
from benchmarks.harness.workload import ModelWorkload

# Raised when docs/quality-protocol.md changes what a result means. The splits and the seeds follow from it, so that a
# protocol that was written with another's results in view is not judged on the same examples and seeds.
PROTOCOL = 2
TEST_EXAMPLES = 1000
VALIDATION_EXAMPLES = 400
# Batches that are sorted by length together: short texts are padded to short ones, and the order stays random.
WINDOW = 8
EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Task:
    """One data set in the study's split; `metric` is what its score is: accuracy, or Pearson's correlation."""

    data: text.TextData

    @property
    def name(self) -> str:
        """The data set's."""
        return self.data.name

    @property
    def metric(self) -> str:
        """One of `statistics.METRICS`."""
        return "accuracy" if self.data.label_names else "pearson"

    @property
    def group(self) -> str:
        """Tasks of one group have the same texts in the same order: TREC's coarse and fine labels."""
        return self.name.removesuffix("-fine")

    def seed(self, number: int) -> int:
        """The seed of everything random in a run: seed `number` on one text has nothing in common with it on another.

        Seeds that gave every task the same head and the same dropout would make the tasks' errors depend on each other.
        """
        return int.from_bytes(hashlib.sha256(f"{PROTOCOL}:{self.group}:{number}".encode()).digest()[:4], "big")

    def training_set(self, size: int | None, seed: int) -> tuple[text.Example, ...]:
        """The first `size` examples of the pool in the seed's order; all of them where `size` is None.

        Raises:
            InputError: if the pool is smaller.
        """
        pool = list(self.data.train)
        if size is not None and not 1 <= size <= len(pool):
            raise InputError(
                f"{self.name} has a pool of {len(pool)} examples: a training set of {size} cannot be drawn"
            )
        # The seed alone decides, so that every method, and every task on the same texts, gets the same ones.
        random.Random(seed).shuffle(pool)
        return tuple(pool[:size])


def load_task(name: str, hub: bool = False) -> Task:
    """A packaged data set or a GLUE task by name, in the study's split. Raises `InputError`.

    GLUE keeps its published evaluation split as the test set.
    """
    data = text.load(name, hub=hub)
    if name in text.PACKAGED_NAMES:
        examples = (*data.test, *data.validation, *data.train)
        test, validation, pool = text.split(examples, PROTOCOL, (TEST_EXAMPLES, VALIDATION_EXAMPLES))
        data = replace(data, train=pool, validation=validation, test=test)
    return Task(data)


class TaskWorkload(ModelWorkload):
    """An encoder on a training set of a task: batches padded to their longest text, ratings standardised.

    `seq` is where texts are cut off. The order of batches is the seed's.
    """

    def __init__(self, task: Task, training_set: Sequence[text.Example], source: models.ModelSource, **options):
        super().__init__(source, data=None, attention="sdpa", **options)
        if source.kind != "encoder" or self.tokenizer is None:
            raise InputError(f"{source.name} is no encoder with a tokenizer, which a study of classification needs")
        self.text = replace(task.data, train=tuple(training_set))
        self.data = task.name
        self.num_labels = task.data.num_labels
        labels = [example.label for example in training_set]
        # With ratings of one spread a learning rate means the same on every task; the correlation does not see it.
        self._mean, self._spread = (0.0, 1.0) if self.num_labels > 1 else (fmean(labels), pstdev(labels) or 1.0)

    def _padded_batches(self) -> Iterator[dict[str, Tensor]]:
        order = random.Random(self.seed)
        examples = self._encoded(self.text.train)
        while True:
            order.shuffle(examples)
            batches = []
            for start in range(0, len(examples), WINDOW * self.batch):
                window = sorted(examples[start : start + WINDOW * self.batch], key=lambda e: len(e[0]["input_ids"]))
                batches += [window[i : i + self.batch] for i in range(0, len(window), self.batch)]
            order.shuffle(batches)
            for batch in batches:
                yield self._placed(self._padded(batch))

    def predictions(self, model: nn.Module, examples: Sequence[text.Example]) -> np.ndarray:
        """The class of each example, or its rating on the original scale: (N,). The model is left in training mode.

        Raises:
            Diverged: if the model's outputs are not finite.
        """
        encoded = self._encoded(examples)
        by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]["input_ids"]))
        found = np.empty(len(encoded), dtype=np.int64 if self.num_labels > 1 else np.float64)
        model.eval()
        with torch.no_grad():
            for start in range(0, len(by_length), EVALUATION_BATCH):
                chosen = by_length[start : start + EVALUATION_BATCH]
                batch = self._placed(self._padded([encoded[i] for i in chosen]))
                del batch["labels"]
                logits = model(**batch).logits
                if not logits.isfinite().all():
                    raise Diverged("the outputs are not finite")
                if self.num_labels > 1:
                    found[chosen] = logits.argmax(dim=1).cpu().numpy()
                else:
                    found[chosen] = logits[:, 0].double().cpu().numpy() * self._spread + self._mean
        model.train()
        return found

    def _encoded(self, examples: Sequence[text.Example]) -> list[tuple[dict[str, list[int]], float]]:
        pairs = [e.pair for e in examples]
        tokens = self.tokenizer(
            [e.text for e in examples],
            pairs if all(pair is not None for pair in pairs) else None,
            truncation=True,
            max_length=self.seq,
        )
        rows = ({name: values[i] for name, values in tokens.items()} for i in range(len(examples)))
        labels = ((e.label - self._mean) / self._spread if self.num_labels == 1 else e.label for e in examples)
        return list(zip(rows, labels, strict=True))

    def _padded(self, batch: Sequence[tuple[dict[str, list[int]], float]]) -> dict[str, Tensor]:
        tokens = self.tokenizer.pad([row for row, _ in batch], return_tensors="pt")
        label_dtype = self.dtype if self.num_labels == 1 else torch.long
        return {**tokens, "labels": torch.tensor([label for _, label in batch], dtype=label_dtype)}
