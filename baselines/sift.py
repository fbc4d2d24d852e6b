"""Sparse Increment Fine-Tuning: a fixed support, the largest entries of the first gradient.

Song et al., "Sparse is Enough in Fine-tuning Pre-trained Large Language Models", ICML 2024, arXiv 2312.11875: of each
weight the x % of entries with the largest gradient train, and gradients and moments exist for those alone. Which they
are is decided once. The authors' code takes the gradient of the FIRST batch, which then counts for no update; so does
this file, whatever `calibration_steps` says.
"""

from __future__ import annotations

from itertools import islice

from torch import Tensor

from baselines.fixed_entries import FixedEntryMethod
from baselines.method import MethodError
from sparsegrad.adapted import replace_layers
from sparsegrad.gradients import stream_gradients
from sparsegrad.support import position_dtype
from sparsegrad.values import check_finite

CHOOSING_STEPS = 1


def largest_positions(gradient: Tensor, k: int) -> Tensor:
    """Rising flat positions (k,) of the k entries of largest magnitude of G (D_out, D_in), which is overwritten."""
    found = gradient.abs_().reshape(-1).topk(k, sorted=False).indices
    return found.to(position_dtype(gradient.numel())).sort().values


class SIFT(FixedEntryMethod):
    """k entries of each target weight, those with the largest first gradient, with moments for those alone."""

    name = "sift"

    def prepare(self, model, batches):
        """Choose the supports by one batch, replace the target layers, set what trains."""
        self.check_model(model)
        chosen: dict[str, Tensor] = {}

        def consume(kind: str, name: str, dy: Tensor, x: Tensor) -> None:
            gradient = dy.T @ x
            check_finite(gradient)
            chosen[name] = largest_positions(gradient, self.entries(tuple(gradient.shape)))

        first = islice(batches, CHOOSING_STEPS)
        stream_gradients(model, self.setting.layers, first, self.setting.backward, consume)
        for name in self.target_names():
            if name not in chosen:
                raise MethodError(f"no gradient of {name!r} arrived to choose its entries by: give at least one batch")

        for name in self.target_names():
            replace_layers(model, [name], lambda layer, name=name: self.fixed(layer, chosen.pop(name)))
        self.freeze_all_but_values(model)
