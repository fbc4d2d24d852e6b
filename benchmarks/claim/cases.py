"""The cases on which the claim is judged: the paper's own, as far as it says what they were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RIVALS = ("lora", "meprop-weight")
PUBLISHED = "sparsegrad"
# Forms of SparseGrad that are this suite's, not the paper's.
FORMS = (
    "sparsegrad-folded",
    "sparsegrad-compact",
    "sparsegrad-fixed",
    "sparsegrad-core",
    "sparsegrad-directions",
)
# Those of them that keep less in memory than the published method does.
MEMORY_TRUE = FORMS[1:]
METHODS = ("full", *RIVALS, PUBLISHED, *FORMS)
# The card whose kernels are meant.
GPU = "a100"


@dataclass(frozen=True)
class Case:
    """A training of the paper's.

    Args:
        name: short, in file names and tables.
        workload: fields of `RunSpec`.
        rank: LoRA's rank in the paper.
        kept: the entries a layer that the paper's SparseGrad and MeProp keep.
        seq_batch: the batch at which the longest sequence that fits is sought.
        note: what the paper says and does not say of the case.
    """

    name: str
    workload: Mapping[str, object]
    rank: int
    kept: int
    seq_batch: int
    note: str

    @property
    def reference(self) -> str:
        """LoRA as the command line writes it: what all are compared with."""
        return f"lora[{self.rank}]"

    def common(self, device: str = "cuda") -> dict[str, object]:
        """The fields of `RunSpec` that all of the case's predictions share, with the optimizer that torch picks."""
        cuda = device == "cuda"
        own = {"device": device, "gpu": GPU if cuda else None, "rounds": 0}
        return {"optimizer_impl": "foreach" if cuda else "for-loop", **self.workload, **own}


ROBERTA_BASE = Case(
    "roberta-base",
    {"model": "roberta-base", "batch": 32, "seq": 128, "dtype": "float32", "train_rest": "all", "targets": "mlp"},
    rank=7,
    kept=22_000,
    seq_batch=128,
    note="GLUE, everything outside the MLP weights trains too. Batches of 16 or 32 by task; the length of sequences is "
    "not said, 128 is an assumption.",
)
ROBERTA_LARGE = Case(
    "roberta-large",
    {"model": "roberta-large", "batch": 32, "seq": 128, "dtype": "float32", "train_rest": "all", "targets": "mlp"},
    rank=10,
    kept=41_943,
    seq_batch=64,
    note="As RoBERTa-base. How many entries are kept is said as 1 % of a layer.",
)
LLAMA = Case(
    "llama-2-7b",
    {"model": "llama-2-7b", "batch": 1, "seq": 512, "dtype": "bfloat16", "train_rest": "none", "targets": "mlp/3"},
    rank=32,
    kept=100_000,
    seq_batch=4,
    note="OpenAssistant, every third block. Neither batch, sequence nor dtype are said: 1 x 512 in bfloat16 are "
    "assumptions. The paper names the up and down projections; the 22 % of the model that its regular fine-tuning "
    "trains are gate, up and down of 11 of the 32 blocks (1.488 of 6.738 billion), which is what is adapted here. "
    "`full` trains the whole model here, not these 22 %. The 0.5 % that the paper says train with LoRA and SparseGrad "
    "are neither rank 32 on these layers (0.24 %) nor 100,000 entries each (0.05 %).",
)
CASES = (ROBERTA_BASE, ROBERTA_LARGE, LLAMA)
# Decoders by size, for the largest that fits; the next known one, of 70 billion, has weights beyond any card here.
LADDER = ("gpt2", "llama-2-7b", "mistral-7b", "qwen-2.5-7b", "llama-3-8b", "llama-2-13b")
ON_LADDER = Case(
    "decoders",
    {"batch": 1, "seq": 512, "dtype": "bfloat16", "train_rest": "none", "targets": "mlp"},
    rank=7,
    kept=0,
    seq_batch=1,
    note="All blocks are adapted, everything else is frozen.",
)
