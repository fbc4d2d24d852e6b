"""A fixed random support: k entries of each weight train, drawn once. The honest floor of every selective method."""

from __future__ import annotations

import torch
from torch import nn

from baselines.fixed_entries import FixedEntryMethod
from sparsegrad.adapted import replace_layers, weight_shape
from sparsegrad.fixed import FixedLinear
from sparsegrad.support import position_dtype


class RandomMask(FixedEntryMethod):
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
            return self.fixed(layer, positions)

        replace_layers(model, self.target_names(), build)
        self.freeze_all_but_values(model)
