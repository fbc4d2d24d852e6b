"""LoRA (Hu et al., ICLR 2022, arXiv 2106.09685): `Y = X W^T + b + (alpha / r) X A^T B^T` with W frozen."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from baselines.method import Knob, LayerBytes, Method, size
from sparsegrad.adapted import AdaptedLinear, adapted_layers, is_transposed, replace_layers, source_weight
from sparsegrad.products import LiveRows

# A is drawn as nn.Linear draws its weight: from the seed that initialised a model it would be that weight's own rows.
SEED_OFFSET = 1_000_003


class LoRAFunction(torch.autograd.Function):
    """The layer in one function, so that no (T, D) temporary exists besides Y, dL/dY and dL/dX."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scaling):
        """x (T, D_in), weight (D_out, D_in), A (r, D_in), B (D_out, r) -> (T, D_out)."""
        a, b = A.to(x.dtype), B.to(x.dtype)
        y = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
        low = x @ a.T
        y.addmm_(low, b.T, alpha=scaling)
        ctx.save_for_backward(x, weight, A, B, low)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """dL/dY (T, D_out) -> dL/dX; dL/dA (r, D_in), dL/dB (D_out, r); dL/db; dL/dW only where W trains."""
        x, weight, A, B, low = ctx.saved_tensors
        live = LiveRows(dy)
        x, low, dy = live.of(x), live.of(low), live.of(dy)
        a, b = A.to(x.dtype), B.to(x.dtype)
        need_x, need_weight, need_bias, need_a, need_b, _ = ctx.needs_input_grad
        dx = dweight = dbias = da = db = None
        if need_b:
            db = (dy.T @ low).mul_(ctx.scaling).to(B.dtype)
        if need_x or need_a:
            dlow = (dy @ b).mul_(ctx.scaling)
        if need_a:
            da = (dlow.T @ x).to(A.dtype)
        if need_x:
            dx = dy @ weight
            dx = live.back(dx.addmm_(dlow, a))
        if need_weight:
            dweight = dy.T @ x
        if need_bias:
            dbias = dy.sum(0)
        return dx, dweight, dbias, da, db, None


class LoRALinear(AdaptedLinear):
    """A frozen linear layer plus a low-rank update: (..., D_in) -> (..., D_out).

    A is initialised as peft does it (Kaiming uniform with a = sqrt(5)) and B with zeros, so that nothing changes at
    first. `weight` is the source's own storage.

    Args:
        linear: nn.Linear or Conv1D.
        rank: r.
        alpha: the update is scaled by alpha / r.
        dtype: dtype of A and B; products are made in the input's.
    """

    def __init__(self, linear: nn.Module, rank: int, alpha: float, dtype: torch.dtype | None = None):
        weight = source_weight(linear)
        super().__init__(weight.shape[1], weight.shape[0], is_transposed(linear))
        self.rank = rank
        self.scaling = alpha / rank
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", linear.bias)
        options = {"dtype": dtype or weight.dtype, "device": weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, **options))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        y = LoRAFunction.apply(
            x.reshape(-1, self.in_features), self.weight, self.bias, self.lora_A, self.lora_B, self.scaling
        )
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """`W + (alpha / r) B A` (D_out, D_in)."""
        return self.weight + (self.lora_B @ self.lora_A).mul_(self.scaling).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Shape, bias and rank."""
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}"


class LoRA(Method):
    """LoRA on the target layers; alpha = 2 r, as is common practice."""

    name = "lora"
    knob = Knob("rank", default=7)
    alpha_over_rank = 2.0

    def prepare(self, model, batches):
        """Wrap the target layers and set what trains. New weights come from the setting's seed."""
        self.check_model(model)
        alpha = self.alpha_over_rank * self.budget

        def build(layer: nn.Module) -> LoRALinear:
            return LoRALinear(layer, self.budget, alpha, self.setting.own_dtype(layer.weight.dtype))

        with torch.random.fork_rng():
            torch.manual_seed(self.setting.seed + SEED_OFFSET)
            replace_layers(model, self.target_names(), build)
        layers = [layer for _, layer in adapted_layers(model)]
        own = [p for layer in layers for p in (layer.lora_A, layer.lora_B)]
        self.freeze(model, own, [layer.weight for layer in layers])

    def layer_params(self, shape):
        """r (D_in + D_out)."""
        return self.budget * (shape[0] + shape[1])

    @classmethod
    def largest_budget(cls, shapes):
        """The rank of the smallest weight."""
        return min(min(shape) for shape in shapes)

    def formula(self, shape, tokens, dtype):
        """W; A and B with gradient and moments; X A^T (T, r) is saved beside X."""
        own = size(self.layer_params(shape), self.setting.own_dtype(dtype))
        return LayerBytes(
            parameter=size(shape[0] * shape[1], dtype) + own,
            gradient=own,
            optimizer=2 * own,
            activation=size(tokens * self.budget, dtype),
        )
