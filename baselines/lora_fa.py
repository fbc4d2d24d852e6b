"""LoRA-FA (Zhang et al., arXiv 2308.03303): LoRA whose A stays as it was drawn, so that X A^T is kept in place of X.

As in the paper's first version: the correction of B's gradient by `(A A^T)^-1`, which its second version adds, is not
made. It would cost a copy of that gradient.
"""

from __future__ import annotations

from baselines.adapter import BottleneckFunction
from baselines.lora import LoRA, LoRALinear
from baselines.method import LayerBytes, size


class LoRAFALinear(LoRALinear):
    """`Y = X W^T + b + (alpha / r) X A^T B^T`, of which B alone trains: (..., D_in) -> (..., D_out)."""

    def of_rows(self, x):
        """(T, D_in) -> (T, D_out)."""
        return BottleneckFunction.apply(x, self.weight, self.bias, self.lora_A, None, self.lora_B, self.scaling)

    def own(self):
        """B."""
        return (self.lora_B,)


class LoRAFA(LoRA):
    """LoRA-FA on the target layers; A, B and their scaling begin as those of `lora`."""

    name = "lora-fa"
    layer_class = LoRAFALinear

    def layer_params(self, shape):
        """r D_out."""
        return self.budget * shape[0]

    def formula(self, shape, tokens, dtype):
        """W and A; B with gradient and moments; X A^T (T, r) is saved, and not X."""
        own_dtype = self.setting.own_dtype(dtype)
        own = size(self.layer_params(shape), own_dtype)
        return LayerBytes(
            parameter=size(shape[0] * shape[1], dtype) + size(self.budget * shape[1], own_dtype) + own,
            gradient=own,
            optimizer=2 * own,
            activation=size(tokens * self.budget, dtype),
            keeps_input=False,
        )
