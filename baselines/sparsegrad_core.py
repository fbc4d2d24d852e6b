"""SparseGrad's leading directions: what a weight does along them trains, and X is not kept for backward."""

from __future__ import annotations

import re
from abc import abstractmethod
from itertools import islice

from baselines.method import EntryMethod, Knob, LayerBytes, Method, MethodError, Shape, size, target_shapes
from sparsegrad import Ranks, calibrate, convert_core, core_shape
from sparsegrad.adapted import adapted_layers


class _Core(Method):
    @abstractmethod
    def core(self, shape: Shape) -> Ranks:
        """The core (k_out, k_in) of a weight of (D_out, D_in); a k_out of 0: all rows, not rotated."""

    def prepare(self, model, batches):
        """Calibrate on `calibration_steps` batches, convert the target layers, set what trains."""
        self.check_model(model)
        layers = self.setting.layers
        ranks = {kind: self.core(target_shapes(model, {kind: names})[0]) for kind, names in layers.items()}
        steps = islice(batches, self.setting.calibration_steps)
        bases = calibrate(model, layers, steps, self.setting.backward, ranks)
        dtype = self.setting.own_dtype(next(iter(bases.values())).U.dtype)
        convert_core(model, layers, bases, dtype)
        cores = [layer for _, layer in adapted_layers(model)]
        self.freeze(model, [layer.core for layer in cores], [layer.weight for layer in cores])

    def basis_tensors(self, model):
        """U and, where there is one, V of every kind."""
        seen = {id(layer.basis): layer.basis for _, layer in adapted_layers(model)}
        return (matrix for basis in seen.values() for matrix in (basis.U, basis.V) if matrix is not None)

    def layer_params(self, shape):
        """k_out k_in."""
        core = self.core(shape)
        return (core.k_out or shape[0]) * core.k_in

    def formula(self, shape, tokens, dtype):
        """W; C with gradient and moments; U and V; X U^T (T, k_in) is saved in X's stead."""
        d_out, d_in = shape
        core = self.core(shape)
        own = size(self.layer_params(shape), self.setting.own_dtype(dtype))
        return LayerBytes(
            parameter=size(d_out * d_in, dtype) + own,
            gradient=own,
            optimizer=2 * own,
            activation=size(tokens * core.k_in, dtype),
            basis=size(core.k_in * d_in + core.k_out * d_out, dtype),
            keeps_input=False,
        )


class SparseGradCore(_Core, EntryMethod):
    """The adapter that makes `sparsegrad.CoreLinear` a method under the harness.

    The budget is the most entries that a layer's core may have, as a count or a density, or the core itself, AxB for
    k_out x k_in in every layer. As in `Ranks`, a k_out of 0 means that the outputs are not rotated: the core has all
    D_out rows.
    """

    name = "sparsegrad-core"

    @classmethod
    def check_budget(cls, budget):
        """A count, a density, or AxB with a k_in of at least 1."""
        if not isinstance(budget, str):
            super().check_budget(budget)
        elif not re.fullmatch(r"\d+x0*[1-9]\d*", budget):
            raise MethodError(
                f"a core is k_out x k_in, with a k_in of at least 1 and a k_out of at least 1 or, for all outputs, 0, "
                f"got {cls.name}[{budget}]"
            )

    def check_budget_fits(self, shapes):
        """Also raise `MethodError` where a core given as AxB is more than a target weight has directions."""
        super().check_budget_fits(shapes)
        if isinstance(self.budget, str):
            core = self.core(shapes[0])
            most = Ranks(min(d_out for d_out, _ in shapes), min(d_in for _, d_in in shapes))
            if core.k_out > most.k_out or core.k_in > most.k_in:
                raise MethodError(
                    f"a core (k_out x k_in) must be at most {most.k_out}x{most.k_in} for these layers, "
                    f"got {self.name}[{self.budget}]"
                )

    def core(self, shape):
        """The core (k_out, k_in) of a weight of (D_out, D_in); a k_out of 0: all rows, not rotated."""
        if isinstance(self.budget, str):
            return Ranks(*map(int, self.budget.split("x")))
        return core_shape(self.entries(shape), shape)


class SparseGradDirections(_Core):
    """The core that is not rotated at the outputs: (D_out, k) along the k leading directions of a layer's inputs.

    It is LoRA with A frozen (LoRA-FA, arXiv 2308.03303), where A's rows are the leading directions of the gradients
    instead of random ones.
    """

    name = "sparsegrad-directions"
    knob = Knob("input directions", default=14)

    def core(self, shape):
        """(0, k)."""
        return Ranks(0, self.budget)

    @classmethod
    def largest_budget(cls, shapes):
        """The smallest D_in."""
        return min(shape[1] for shape in shapes)
