"""A fixed random support: k entries of each weight train, drawn once. The honest floor of every selective method."""

from __future__ import annotations

import torch
from torch import nn

from baselines.method import EntryMethod, LayerBytes, size
from sparsegrad.adapted import adapted_layers, replace_layers, weight_shape
from sparsegrad.basis import TransitionMatrices
from sparsegrad.fixed import FixedLinear
from sparsegrad.support import position_dtype


class RandomMask(EntryMethod):
    """k entries of each target weight, drawn once without looking at any gradient, with moments for those alone."""

    name = "random-mask"

    def prepare(self, model, batches):
        """Draw the supports from the setting's seed, replace the target layers, set what trains."""
        self.check_model(model)
        generator = torch.Generator().manual_seed(self.setting.seed)

        def build(layer: nn.Module) -> FixedLinear:
            count = layer.weight.numel()
            chosen = torch.randperm(count, generator=generator)[: self.entries(weight_shape(layer))]
            positions = chosen.sort().values.to(layer.weight.device, position_dtype(count))
            # In no basis but the weight's own.
            dtype = self.setting.own_dtype(layer.weight.dtype)
            return FixedLinear.in_basis(layer, TransitionMatrices(None, None), positions, dtype)

        replace_layers(model, self.target_names(), build)
        layers = [layer for _, layer in adapted_layers(model)]
        self.freeze(model, [layer.values for layer in layers], [layer.weight for layer in layers])

    def basis_tensors(self, model):
        """The positions of the trained entries."""
        return (layer.index for _, layer in adapted_layers(model))

    def formula(self, shape, tokens, dtype):
        """W; k values with gradient and moments; k int32 positions."""
        k = self.entries(shape)
        own = size(k, self.setting.own_dtype(dtype))
        return LayerBytes(
            parameter=size(shape[0] * shape[1], dtype) + own,
            gradient=own,
            optimizer=2 * own,
            basis=size(k, position_dtype(shape[0] * shape[1])),
        )
