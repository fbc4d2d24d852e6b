"""SparseGrad with a fixed support: k entries of each W~ train, chosen once by the energy of their gradients."""

from __future__ import annotations

from itertools import islice

import torch

from baselines.method import EntryMethod, LayerBytes, size
from sparsegrad import calibrate
from sparsegrad.adapted import adapted_layers
from sparsegrad.fixed import choose_entries, convert_fixed, fixed_ranks
from sparsegrad.mlp import checked_shapes
from sparsegrad.support import position_dtype


class SparseGradFixed(EntryMethod):
    """The side of the weight with fewer dimensions is rotated; values and moments exist for the chosen entries alone.

    Of `calibration_steps` batches the last third, at least one, chooses the entries, and those before it give the
    bases; where there is one batch in all, it does both.
    """

    name = "sparsegrad-fixed"

    def prepare(self, model, batches):
        """Calibrate, choose the entries, convert the target layers, set what trains."""
        self.check_model(model)
        layers, backward = self.setting.layers, self.setting.backward
        density = self.budget if isinstance(self.budget, float) else None
        budget = {"nnz": None if density is not None else self.budget, "density": density}
        ranks = {kind: fixed_ranks(shape, **budget) for kind, shape in checked_shapes(model, layers).items()}
        steps, batches = self.setting.calibration_steps, iter(batches)
        choosing = max(1, steps // 3)
        if steps > 1:
            first, last = islice(batches, steps - choosing), islice(batches, choosing)
        else:
            first = last = list(islice(batches, 1))
        bases = calibrate(model, layers, first, backward, ranks)
        chosen = choose_entries(model, layers, bases, last, backward, **budget)
        dtype = torch.float32 if self.setting.adapter_dtype == "float32" else None
        convert_fixed(model, layers, bases, chosen, dtype)
        adapted = [layer for _, layer in adapted_layers(model)]
        self.freeze(model, [layer.values for layer in adapted], [layer.weight for layer in adapted])

    def basis_tensors(self, model):
        """U or V of every kind, and the positions of the trained entries."""
        adapted = [layer for _, layer in adapted_layers(model)]
        seen = {id(layer.basis): layer.basis for layer in adapted}
        yield from (matrix for basis in seen.values() for matrix in (basis.U, basis.V) if matrix is not None)
        yield from (layer.index for layer in adapted)

    def formula(self, shape, tokens, dtype):
        """W; k values with gradient and moments; k positions, U or V. Where there is U, X U^T is kept in X's stead."""
        d_out, d_in = shape
        k = self.entries(shape)
        k_out, k_in = fixed_ranks(shape, nnz=k)
        own = size(k, self.setting.own_dtype(dtype))
        return LayerBytes(
            parameter=size(d_out * d_in, dtype) + own,
            gradient=own,
            optimizer=2 * own,
            activation=size(tokens * k_in, dtype),
            basis=size(k, position_dtype(d_out * d_in)) + size(k_out * d_out + k_in * d_in, dtype),
            keeps_input=k_in == 0,
        )
