"""Seeded inputs, tiny transformers models and what "the model is as it was" means."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TEXT_MODEL = {
    "vocab_size": 41,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    # Wider than the usual 0.02, so that the blocks matter for the outputs.
    "initializer_range": 0.3,
}
# model_type -> the class that holds it with a loss, what differs from TEXT_MODEL, and what labels it takes
TINY = {
    "bert": ("AutoModelForSequenceClassification", {}),
    "roberta": ("AutoModelForSequenceClassification", {}),
    "gpt2": ("AutoModelForCausalLM", {"vocab_size": 41, "n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 16}),
    "llama": ("AutoModelForCausalLM", {"num_key_value_heads": 1}),
}


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operations return inside, views left out."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    @property
    def largest(self) -> int:
        return max(self.sizes, default=0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known:
                self.sizes.append(tensor.untyped_storage().nbytes())
        return result


@pytest.fixture
def allocations():
    """A context that says what operations allocate inside, for what must not exist as a whole."""
    return Allocations


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def orthogonal():
    """size, dtype -> a random orthogonal matrix, orthogonal to the dtype's rounding."""

    def build(size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q.to(dtype)

    return build


@pytest.fixture
def distance():
    """Largest deviation from what is expected, relative to the largest expected magnitude."""

    def measure(actual: torch.Tensor, expected: torch.Tensor) -> float:
        assert actual.shape == expected.shape
        actual, expected = actual.detach().double(), expected.detach().double()
        return float((actual - expected).abs().max() / expected.abs().max())

    return measure


@pytest.fixture
def unchanged():
    """A context in which a model keeps its modules, parameters, values, flags and gradients."""

    def facts(model):
        modules = {name: module for name, module in model.named_modules()}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        flags = {name: (parameter.requires_grad, parameter.grad) for name, parameter in parameters.items()}
        return modules, {name: id(parameter) for name, parameter in parameters.items()}, flags

    @contextmanager
    def watch(model):
        before = facts(model)
        values = {name: value.clone() for name, value in model.state_dict().items()}
        yield
        assert facts(model) == before
        after = model.state_dict()
        assert after.keys() == values.keys()
        for name, value in values.items():
            assert torch.equal(after[name], value), name

    return watch


@pytest.fixture
def tiny():
    """model_type -> a model with random weights, and one batch with padding and labels."""
    transformers = pytest.importorskip("transformers")

    def build(model_type: str, auto: str | None = None, **changes):
        default_auto, differs = TINY.get(model_type, ("AutoModelForCausalLM", {}))
        config = transformers.AutoConfig.for_model(model_type, **{**TEXT_MODEL, **differs, **changes})
        model = getattr(transformers, auto or default_auto).from_config(config).eval()
        tokens = torch.randint(3, 41, (3, 7))
        mask = torch.ones_like(tokens)
        mask[0, 4:] = 0
        labels = torch.tensor([0, 1, 1]) if "Classification" in (auto or default_auto) else tokens.clone()
        return model, {"input_ids": tokens, "attention_mask": mask, "labels": labels}

    return build
