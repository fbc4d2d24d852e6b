"""Layers that stand in for a linear layer of a model, and how they are put in place and taken out again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from sparsegrad.errors import SparseGradError


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer stores its weight as (D_in, D_out): transformers' Conv1D, which GPT-2 uses."""
    # No model can hold a Conv1D before that module was imported, so it need not be imported here.
    module = sys.modules.get("transformers.pytorch_utils")
    return module is not None and isinstance(layer, module.Conv1D)


def is_linear(layer: nn.Module) -> bool:
    """Whether the layer is a plain linear one, as torch or GPT-2 writes it."""
    return type(layer) is nn.Linear or is_transposed(layer)


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """(D_out, D_in) of a linear layer, however it stores its weight."""
    rows, cols = layer.weight.shape
    return (cols, rows) if is_transposed(layer) else (rows, cols)


class AdaptedLinear(nn.Module):
    """Base of the layers that replace a linear layer: (..., D_in) -> (..., D_out).

    `transposed` remembers that the source stored its weight as (D_in, D_out), so that merging restores its kind.
    """

    def __init__(self, in_features: int, out_features: int, transposed: bool = False):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.transposed = transposed
        self.bias: nn.Parameter | None

    def effective_weight(self) -> Tensor:
        """The weight (D_out, D_in) of the plain linear layer that computes the same, in the layer's dtype."""
        raise TypeError(f"{type(self).__name__} does not say its effective weight")

    @torch.no_grad()
    def to_linear(self) -> nn.Module:
        """A plain layer of the source's kind that computes what this one does; shares the bias, not the weight."""
        weight = self.effective_weight()
        if self.transposed:
            from transformers.pytorch_utils import Conv1D

            plain = Conv1D(1, 1)
            plain.nf, plain.nx = self.out_features, self.in_features
            plain.weight = nn.Parameter(weight.T.contiguous())
            plain.bias = self.bias
        else:
            plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(weight)
            plain.bias = self.bias
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """Shape and bias, as nn.Linear prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def source_weight(layer: nn.Module) -> Tensor:
    """The weight of a plain linear layer as (D_out, D_in): the same storage, a view where it is stored transposed."""
    weight = layer.weight.detach()
    return weight.T if is_transposed(layer) else weight


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """Name and layer of every replaced linear layer."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module


def check_unconverted(model: nn.Module) -> None:
    """Raise `SparseGradError` where layers of the model were replaced already."""
    for name, layer in adapted_layers(model):
        raise SparseGradError(
            f"the model is converted already ({name!r} is a {type(layer).__name__}); "
            "merge it first or start from the original"
        )


def replace_layers(model: nn.Module, names: Iterable[str], build: Callable[[nn.Module], nn.Module]) -> None:
    """Put `build(layer)` in place of each named layer, one at a time, so that each old weight can be freed in turn."""
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, build(layer).train(layer.training))


def merge(model: nn.Module) -> nn.Module:
    """Put a plain linear layer in place of every replaced one, in place; returns the model.

    A model that is itself one replaced layer has no place to put it in: its plain layer is returned.

    Raises:
        SparseGradError: the model has no replaced layer.
    """
    if isinstance(model, AdaptedLinear):
        return model.to_linear()
    names = [name for name, _ in adapted_layers(model)]
    if not names:
        raise SparseGradError(f"{type(model).__name__} holds no converted layer to merge")
    replace_layers(model, names, lambda layer: layer.to_linear())
    return model
