"""Gradient-Mask Tuning: every weight trains, and the optimizer is shown only the largest entries of each gradient.

Li et al., "Gradient-Mask Tuning Elevates the Upper Limits of LLM Performance", arXiv 2406.15330. Of the gradient Γ that
was accumulated between two steps of the optimizer (here by one batch), M(Γ, k) keeps the entries of largest magnitude
and makes the others zero. AdamW takes it as any gradient: a zero enters the moments as a zero, so that they are dense,
and an entry that was chosen once goes on moving until its first moment has decayed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baselines.full import FullLinear
from baselines.method import EntryMethod, LayerBytes, size
from sparsegrad.adapted import adapted_layers, replace_layers
from sparsegrad.products import BLOCK_FRACTION


def keep_largest_(gradient: Tensor, k: int) -> Tensor:
    """Make all but the k entries of largest magnitude of Γ (D_out, D_in) zero, in place; returns Γ.

    Exactly k stay; of several with the least magnitude that is kept, it is not said which. Magnitudes are looked at in
    blocks of rows: neither a mask nor a copy of the gradient exists whole.
    """
    if k == gradient.numel():
        return gradient
    height = -(-gradient.shape[0] // BLOCK_FRACTION)
    largest = positions = None
    for first in range(0, gradient.shape[0], height):
        magnitudes = gradient[first : first + height].abs().reshape(-1)
        values, found = magnitudes.topk(min(k, magnitudes.numel()), sorted=False)
        del magnitudes
        found += first * gradient.shape[1]
        if largest is None:
            largest, positions = values, found
        else:
            largest, positions = torch.cat((largest, values)), torch.cat((positions, found))
        del values, found
        if largest.numel() > k:
            largest, kept = largest.topk(k, sorted=False)
            positions = positions[kept]
            del kept
    del largest
    entries = torch.take(gradient, positions)
    return gradient.zero_().put_(positions, entries)


class GMT(EntryMethod):
    """All entries train with dense moments; each step's gradient has k entries that are not zero.

    `budget_params` counts these k; AdamW writes every entry, which is what `updated_params` says.
    """

    name = "gmt"

    def prepare(self, model, batches):
        """Let the target weights train, and the rest as the regime says. No batch is needed."""
        self.check_model(model)
        replace_layers(model, self.target_names(), FullLinear)
        self.freeze(model, [layer.weight for _, layer in adapted_layers(model)], [])

    def after_backward(self, model):
        """Mask the gradients of the target weights."""
        for _, layer in adapted_layers(model):
            if layer.weight.grad is not None:
                keep_largest_(layer.weight.grad, self.entries(layer.weight.shape))

    def formula(self, shape, tokens, dtype):
        """As full fine-tuning: W, its gradient and two moments; a masked gradient is no smaller."""
        weight = size(shape[0] * shape[1], dtype)
        return LayerBytes(parameter=weight, gradient=weight, optimizer=2 * weight)
