"""Full fine-tuning (every parameter, AdamW), and the head alone: the ceiling and the floor."""

from __future__ import annotations

from torch import Tensor, nn

from baselines.linear import LinearFunction
from baselines.method import TASK_HEAD, LayerBytes, Method, size
from sparsegrad.adapted import AdaptedLinear, is_transposed, replace_layers, source_weight


class FullLinear(AdaptedLinear):
    """A linear layer whose whole weight trains: nn.Linear, but for the zero rows of dL/dY that its backward skips.

    Every method skips them, so that none is compared with one that pays for padding.
    """

    def __init__(self, linear: nn.Module):
        weight = source_weight(linear)
        super().__init__(weight.shape[1], weight.shape[0], is_transposed(linear))
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        y = LinearFunction.apply(x.reshape(-1, self.in_features), self.weight, self.bias, None)
        return y.view(*x.shape[:-1], self.out_features)

    def effective_weight(self) -> Tensor:
        """The weight itself."""
        return self.weight.detach()


class Full(Method):
    """Every parameter of the model trains, in either regime."""

    name = "full"

    def prepare(self, model, batches):
        """Let everything train."""
        self.check_model(model)
        replace_layers(model, self.target_names(), FullLinear)
        model.requires_grad_(True)

    def formula(self, shape, tokens, dtype):
        """W, its gradient and two moments."""
        weight = size(shape[0] * shape[1], dtype)
        return LayerBytes(parameter=weight, gradient=weight, optimizer=2 * weight)


class Head(Method):
    """Only the head trains: the task's own head, or the output embeddings of a language model; in either regime."""

    name = "head"

    def prepare(self, model, batches):
        """Freeze everything but the head. A lone layer or block has no head: nothing trains."""
        self.check_model(model)
        head = {id(p) for name, p in model.named_parameters() if TASK_HEAD.search(name)}
        if not head and hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None:
            head = {id(p) for p in model.get_output_embeddings().parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in head)

    def formula(self, shape, tokens, dtype):
        """W alone: a frozen layer's backward needs no X."""
        return LayerBytes(parameter=size(shape[0] * shape[1], dtype), gradient=0, optimizer=0, keeps_input=False)
