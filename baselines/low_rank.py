"""What GaLore and APOLLO share: whole weights train, and Adam's moments are those of a projected gradient."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from baselines.full import FullLinear
from baselines.method import Knob, Method
from sparsegrad.adapted import adapted_layers, replace_layers


class LowRankAdam(Optimizer):
    """Base of optimizers that keep Adam's moments of a projection R of each gradient G (D_out, D_in).

    The smaller side of G is projected to `rank` dimensions: R is (rank, D_in) where D_out <= D_in, else (D_out, rank).
    No weight decay. A parameter whose gradient is None is left alone.

    Args:
        params: weights (D_out, D_in) with dense gradients.
        lr: step size.
        rank: r, at most the smaller side.
        gap: steps after which there is another projection.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        rank: int,
        gap: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **more: object,
    ):
        super().__init__(params, {"lr": lr, "rank": rank, "gap": gap, "betas": betas, "eps": eps, **more})

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns the closure's loss where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["step"] = state.get("step", 0) + 1
                    self.update(parameter, state, group)
        return loss

    def update(self, parameter: Tensor, state: dict, group: dict) -> None:
        """Step number `state["step"]`, from 1, of one parameter."""
        raise NotImplementedError


def projects_left(gradient: Tensor) -> bool:
    """Whether the smaller side of G (D_out, D_in) is D_out; of equal ones it is."""
    return gradient.shape[0] <= gradient.shape[1]


def adam_(projected: Tensor, state: dict, group: dict) -> Tensor:
    """Adam(R) of a projected gradient R, written over it; returns it.

    `M / (1 - beta1^t) / (sqrt(V / (1 - beta2^t)) + eps)` at step t of the state, whose moments take R in.
    """
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(projected), torch.zeros_like(projected)
    first, second = state["exp_avg"], state["exp_avg_sq"]
    beta1, beta2 = group["betas"]
    first.lerp_(projected, 1 - beta1)
    second.mul_(beta2).addcmul_(projected, projected, value=1 - beta2)
    root = torch.sqrt(second, out=projected).div_((1 - beta2 ** state["step"]) ** 0.5).add_(group["eps"])
    return torch.div(first, root, out=root).div_(1 - beta1 ** state["step"])


class LowRankMethod(Method):
    """Base of methods that train the whole target weights with an optimizer of their own; AdamW has all else.

    `optimizer_impl` says how that AdamW runs; the method's own optimizer goes weight by weight.
    """

    # The rank at which GaLore's paper fine-tunes on GLUE (it also has 4).
    knob = Knob("rank", default=8)
    gap: ClassVar[int] = 200  # steps between two projections, in both papers

    def prepare(self, model, batches):
        """Let the target weights train, and the rest as the regime says. No batch is needed."""
        self.check_model(model)
        replace_layers(model, self.target_names(), FullLinear)
        self.freeze(model, [layer.weight for _, layer in adapted_layers(model)], [])

    @abstractmethod
    def weight_optimizer(self, weights: Sequence[nn.Parameter], lr: float) -> Optimizer:
        """The optimizer of the target weights."""

    def optimizers(self, model, lr):
        """The method's own for the target weights, AdamW for all others that train."""
        weights = [layer.weight for _, layer in adapted_layers(model)]
        known = {id(weight) for weight in weights}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        own = self.weight_optimizer(weights, lr)
        return [own, self.dense_optimizer(rest, lr)] if rest else [own]

    def layer_params(self, shape):
        """r max(D_out, D_in): the entries of the projected gradient, which are what has moments."""
        return self.budget * max(shape)

    @classmethod
    def largest_budget(cls, shapes):
        """The rank of the smallest weight."""
        return min(min(shape) for shape in shapes)
