"""Tiny random models, their batches, and a method applied to them."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from baselines.method import Setting
from baselines.registry import get
from sparsegrad import find_layers

VOCABULARY, LABELS = 61, 3
HIDDEN, INNER = 16, 24
BATCH, SEQ = 3, 7
CALIBRATION_STEPS = 2


@pytest.fixture(scope="session")
def build_model():
    """family -> a random model in eval mode (no dropout); the same weights at every call."""
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": VOCABULARY, "pad_token_id": 0, "num_labels": LABELS}
    bert = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": SEQ,
    }
    gpt2 = {"n_embd": HIDDEN, "n_inner": INNER, "n_layer": 2, "n_head": 2, "n_positions": SEQ}
    llama = {**bert, "tie_word_embeddings": False}
    families = {
        "bert": (transformers.BertForSequenceClassification, transformers.BertConfig, bert),
        "bert-qa": (transformers.BertForQuestionAnswering, transformers.BertConfig, bert),
        "roberta": (
            transformers.RobertaForSequenceClassification,
            transformers.RobertaConfig,
            {**bert, "max_position_embeddings": SEQ + 2},
        ),
        "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config, gpt2),
        "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, llama),
        "llama-score": (transformers.LlamaForSequenceClassification, transformers.LlamaConfig, llama),
    }

    def build(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        architecture, config, sizes = families[family]
        model = architecture(config(**common, **sizes)).eval()
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            # As initialised, an MLP adds next to nothing to the residual stream, and a mistake in it would not show.
            if parameter.dim() > 1:
                parameter.data.normal_(std=0.3, generator=generator)
            elif name.endswith("bias"):
                parameter.data.normal_(std=0.1, generator=generator)
        return model.to(dtype)

    return build


@pytest.fixture(scope="session")
def batches():
    """model -> endless batches with labels, other ones each time, the same sequence at every call."""

    def make(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(7)
        while True:
            tokens = torch.randint(1, VOCABULARY, (BATCH, SEQ), generator=generator)
            labels = torch.randint(LABELS, (BATCH,), generator=generator)
            per_token = type(model).__name__.endswith(("LMHeadModel", "ForCausalLM"))
            yield {"input_ids": tokens, "labels": tokens if per_token else labels}

    return make


@pytest.fixture(scope="session")
def apply(batches):
    """Prepare a model of a known family by a method, by name; returns the method."""

    def prepare(name, model, budget=None, layers=None, **setting):
        layers = layers or find_layers(model)
        method = get(name)(budget, Setting(layers, **{"calibration_steps": CALIBRATION_STEPS, **setting}))
        method.prepare(model, batches(model))
        return method

    return prepare


@pytest.fixture(scope="session")
def train(batches):
    """Train a prepared model for some steps; the gradients of the last step stay."""

    def steps(method, model, count: int, lr: float):
        optimizers = method.optimizers(model, lr)
        stream = batches(model)
        for _ in range(count):
            model.zero_grad(set_to_none=True)
            model(**next(stream)).loss.backward()
            method.after_backward(model)
            for optimizer in optimizers:
                optimizer.step()
            method.after_step(model)

    return steps


@pytest.fixture(scope="session")
def logits(batches):
    """What a model computes for its first batch, without gradients."""

    def compute(model):
        with torch.no_grad():
            return model(**next(batches(model))).logits

    return compute
