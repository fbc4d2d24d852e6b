"""SparseGrad's steps, as published, for weights that stay in their own coordinates: one product where it has three."""

from __future__ import annotations

from dataclasses import replace

from baselines.sparsegrad import SparseGrad
from sparsegrad.folded import convert_folded


class SparseGradFolded(SparseGrad):
    """The adapter that makes `sparsegrad.FoldedLinear` a method under the harness."""

    name = "sparsegrad-folded"
    convert = staticmethod(convert_folded)

    def formula(self, shape, tokens, dtype):
        """As the published form, but that X is kept, as by any linear layer, and no X~."""
        return replace(super().formula(shape, tokens, dtype), activation=0, keeps_input=True)
