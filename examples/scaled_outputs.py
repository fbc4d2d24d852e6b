"""A method in one file: each output of a target layer is scaled by a trained factor, and its weight stays as it is.

sparsegrad-bench run --model minilm-l6 --methods full,lora[7] --method examples/scaled_outputs.py:ScaledOutputs
"""

import torch
from torch import nn

from baselines.method import LayerBytes, Method, size
from sparsegrad.adapted import AdaptedLinear, adapted_layers, is_transposed, replace_layers, source_weight


class ScaledLinear(AdaptedLinear):
    def __init__(self, linear):
        weight = source_weight(linear)
        super().__init__(weight.shape[1], weight.shape[0], is_transposed(linear))
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", linear.bias)
        self.scale = nn.Parameter(torch.ones(self.out_features, dtype=weight.dtype, device=weight.device))

    def forward(self, x):
        y = x @ self.weight.T * self.scale
        return y if self.bias is None else y + self.bias

    def effective_weight(self):
        return self.scale.unsqueeze(1) * self.weight


class ScaledOutputs(Method):
    def prepare(self, model, batches):
        self.check_model(model)
        replace_layers(model, self.target_names(), ScaledLinear)
        layers = [layer for _, layer in adapted_layers(model)]
        self.freeze(model, [layer.scale for layer in layers], [layer.weight for layer in layers])

    def formula(self, shape, tokens, dtype):
        own = size(shape[0], dtype)
        return LayerBytes(size(shape[0] * shape[1], dtype) + own, gradient=own, optimizer=2 * own)
