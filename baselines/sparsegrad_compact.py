"""SparseGrad's moving support without dense tensors: one basis, gradients in row blocks, moments of some entries."""

from __future__ import annotations

from itertools import islice

from baselines.method import EntryMethod, LayerBytes, coo_bytes, size
from sparsegrad import Ranks, SparseAdam, calibrate, convert
from sparsegrad.adapted import adapted_layers
from sparsegrad.mlp import checked_shapes
from sparsegrad.products import BLOCK_FRACTION
from sparsegrad.support import position_dtype

# Moments are kept for so many times the entries of a step; `SparseAdam` tells what the update is then.
CAPACITY = 4


class SparseGradCompact(EntryMethod):
    """The smaller side of each weight is rotated, the larger one stays as it is.

    A step trains the k largest entries of the gradient, as `sparsegrad` does. They are found in row blocks, and moments
    are kept for `CAPACITY` times k entries.
    """

    name = "sparsegrad-compact"
    accumulates = False

    def prepare(self, model, batches):
        """Calibrate on `calibration_steps` batches, convert the target layers, set what trains."""
        self.check_model(model)
        steps = islice(batches, self.setting.calibration_steps)
        shapes = checked_shapes(model, self.setting.layers)
        ranks = {kind: _smaller_side(shape) for kind, shape in shapes.items()}
        bases = calibrate(model, self.setting.layers, steps, self.setting.backward, ranks=ranks)
        density = self.budget if isinstance(self.budget, float) else None
        nnz = None if density is not None else self.budget
        convert(model, self.setting.layers, bases, nnz=nnz, density=density, blocks=BLOCK_FRACTION)
        self.freeze(model, self.sparse_parameters(model), [])

    def sparse_optimizer(self, parameters, lr):
        """SparseAdam with moments of some entries; SparseSGD has none in either form."""
        if self.setting.optimizer == "sgd":
            return super().sparse_optimizer(parameters, lr)
        return SparseAdam(parameters, lr=lr, capacity=CAPACITY)

    def sparse_parameters(self, model):
        """W~ of every target layer."""
        return (layer.weight for _, layer in adapted_layers(model))

    def basis_tensors(self, model):
        """U or V of every kind."""
        seen = {id(layer.basis): layer.basis for _, layer in adapted_layers(model)}
        return (matrix for basis in seen.values() for matrix in (basis.U, basis.V) if matrix is not None)

    def formula(self, shape, tokens, dtype):
        """W~, a COO gradient, the slots of SparseAdam (a position and two moments), U or V.

        Where U rotates, X~ (T, D_in) is saved in X's stead.
        """
        d_out, d_in = shape
        k = self.entries(shape)
        slots = min(d_out * d_in, CAPACITY * k)
        rotates_input = _smaller_side(shape).k_in > 0
        return LayerBytes(
            parameter=size(d_out * d_in, dtype),
            gradient=coo_bytes(k, dtype),
            optimizer=size(slots, position_dtype(d_out * d_in)) + 2 * size(slots, dtype),
            activation=size(tokens * d_in, dtype) if rotates_input else 0,
            basis=size(min(d_in, d_out) ** 2, dtype),
            keeps_input=not rotates_input,
        )


def _smaller_side(shape: tuple[int, int]) -> Ranks:
    d_out, d_in = shape
    return Ranks(0, d_in) if d_in <= d_out else Ranks(d_out, 0)
