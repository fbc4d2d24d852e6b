"""SparseGrad's steps, as published, for weights that stay in their own coordinates: one product where it has three."""

from __future__ import annotations

from itertools import islice

from baselines.method import EntryMethod, LayerBytes, coo_bytes, size
from sparsegrad import calibrate
from sparsegrad.adapted import adapted_layers
from sparsegrad.folded import convert_folded


class SparseGradFolded(EntryMethod):
    """The adapter that makes `sparsegrad.FoldedLinear` a method under the harness."""

    name = "sparsegrad-folded"

    def prepare(self, model, batches):
        """Calibrate on `calibration_steps` batches, convert the target layers, set what trains."""
        self.check_model(model)
        steps = islice(batches, self.setting.calibration_steps)
        bases = calibrate(model, self.setting.layers, steps, self.setting.backward)
        density = self.budget if isinstance(self.budget, float) else None
        nnz = None if density is not None else self.budget
        convert_folded(model, self.setting.layers, bases, nnz=nnz, density=density)
        self.freeze(model, self.sparse_parameters(model), [])

    def sparse_parameters(self, model):
        """W of every target layer."""
        return (layer.weight for _, layer in adapted_layers(model))

    def basis_tensors(self, model):
        """U and V of every kind."""
        seen = {id(layer.basis): layer.basis for _, layer in adapted_layers(model)}
        return (matrix for basis in seen.values() for matrix in (basis.U, basis.V))

    def formula(self, shape, tokens, dtype):
        """W, a COO gradient, SparseAdam's two dense moments, U and V; X is kept as by any linear layer."""
        d_out, d_in = shape
        weight = size(d_out * d_in, dtype)
        return LayerBytes(
            parameter=weight,
            gradient=coo_bytes(self.entries(shape), dtype),
            optimizer=2 * weight,
            basis=size(d_in * d_in + d_out * d_out, dtype),
        )
