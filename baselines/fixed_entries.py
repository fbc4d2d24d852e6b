"""What methods share whose support is fixed: k entries of each weight, chosen once, in the weight's own basis."""

from __future__ import annotations

from torch import Tensor, nn

from baselines.method import EntryMethod, LayerBytes, size
from sparsegrad.adapted import adapted_layers
from sparsegrad.basis import TransitionMatrices
from sparsegrad.fixed import FixedLinear
from sparsegrad.support import position_dtype


class FixedEntryMethod(EntryMethod):
    """Base of these methods: each chooses positions in its `prepare`, and ends it with `freeze_all_but_values`."""

    def fixed(self, layer: nn.Module, positions: Tensor) -> FixedLinear:
        """The layer of which the entries at `positions` train: rising flat positions (k,), in `position_dtype`."""
        basis = TransitionMatrices(None, None)
        return FixedLinear.in_basis(layer, basis, positions, self.setting.own_dtype(layer.weight.dtype))

    def freeze_all_but_values(self, model: nn.Module) -> None:
        """Set what trains of a model whose target layers are replaced."""
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
