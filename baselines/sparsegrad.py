"""SparseGrad as published: bases from 30 backward passes, a moving top-k per step, SparseAdam with dense moments."""

from __future__ import annotations

from itertools import islice

from baselines.method import EntryMethod, LayerBytes, coo_bytes, size
from sparsegrad import calibrate, convert
from sparsegrad.adapted import adapted_layers


class SparseGrad(EntryMethod):
    """The adapter that makes the package `sparsegrad` a method under the harness."""

    name = "sparsegrad"
    accumulates = False
    convert = staticmethod(convert)

    def prepare(self, model, batches):
        """Calibrate on `calibration_steps` batches, convert the target layers, set what trains."""
        self.check_model(model)
        steps = islice(batches, self.setting.calibration_steps)
        bases = calibrate(model, self.setting.layers, steps, self.setting.backward)
        density = self.budget if isinstance(self.budget, float) else None
        nnz = None if density is not None else self.budget
        self.convert(model, self.setting.layers, bases, nnz=nnz, density=density)
        self.freeze(model, self.sparse_parameters(model), [])

    def sparse_parameters(self, model):
        """W~ of every target layer."""
        return (layer.weight for _, layer in adapted_layers(model))

    def basis_tensors(self, model):
        """U and V of every kind."""
        seen = {id(layer.basis): layer.basis for _, layer in adapted_layers(model)}
        return (matrix for basis in seen.values() for matrix in (basis.U, basis.V))

    def formula(self, shape, tokens, dtype):
        """W~, a COO gradient, SparseAdam's two dense moments, U and V; X~ (T, D_in) is saved in X's stead."""
        d_out, d_in = shape
        weight = size(d_out * d_in, dtype)
        return LayerBytes(
            parameter=weight,
            gradient=coo_bytes(self.entries(shape), dtype),
            optimizer=2 * weight,
            activation=size(tokens * d_in, dtype),
            basis=size(d_in * d_in + d_out * d_out, dtype),
            keeps_input=False,
        )
