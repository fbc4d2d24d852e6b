"""AdamW with moments in 8 bits (Dettmers et al., ICLR 2022, arXiv 2110.02861), stored as by bitsandbytes' AdamW8bit.

A moment is a value of the 8-bit dynamic data type, times the largest magnitude in its block of 256 entries (sections
2.1 and 2.2): of either sign for the first moment, from zero on for the second. Each step makes a block's moments
float32, does Adam's arithmetic with them, and stores them again; the weight moves by those that were not rounded yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import Optimizer

from baselines.dynamic8 import dynamic_table, middles
from sparsegrad.errors import SparseGradError

BLOCK = 256
# Smaller parameters keep float32 moments, as bitsandbytes' do: there are few bytes to gain.
SMALLEST = 4096
# A parameter is stepped in parts of at least so many entries, and in `PARTS` of them where it is large: only a kernel
# could hold a block's float32 in registers. What is temporary is a part's.
PART, PARTS = 2**20, 16

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW8bit(Optimizer):
    """Adam with 8-bit block-wise moments, without weight decay.

    State of a parameter of n >= 4096 entries: two codes of n bytes in its shape, two float32 magnitudes of
    (ceil(n / 256),), and two tables of 256 float32 that all parameters on a device share. A smaller one has two float32
    moments of its shape. The step count is a Python integer.

    Args:
        params: parameters with dense gradients, in one piece of memory.
        lr: step size.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.

    Raises:
        SparseGradError: a hyper-parameter is out of range; a gradient is sparse, or a parameter not contiguous, before
            any parameter has moved.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        if not lr > 0:
            raise SparseGradError(f"lr must be positive, got {lr}")
        if not eps > 0:
            raise SparseGradError(f"eps must be positive, got {eps}")
        if not all(0 <= beta < 1 for beta in betas):
            raise SparseGradError(f"betas must be in [0, 1), got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._tables = {}

    def load_state_dict(self, state_dict):
        """As torch's, but for dtypes: codes stay integers, and magnitudes and moments float32."""
        super().load_state_dict(state_dict)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(keys, own, strict=True):
            given = state_dict["state"].get(key, {})
            kept = {name: value for name, value in given.items() if isinstance(value, Tensor) and "table" not in name}
            for name, value in kept.items():
                self.state[parameter][name] = value.to(parameter.device, copy=True)
            if "table" in given or "table_sq" in given:
                self.state[parameter].update(self._shared(parameter.device))

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns the closure's loss where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter, _ in moved:
            shape = tuple(parameter.shape)
            if parameter.grad.layout != torch.strided:
                raise SparseGradError(
                    f"AdamW8bit needs dense gradients, got a {parameter.grad.layout} one of shape {shape}; give this "
                    "parameter to SparseAdam"
                )
            if not parameter.is_contiguous():
                raise SparseGradError(
                    f"AdamW8bit needs contiguous parameters, got one of shape {shape} with strides "
                    f"{parameter.stride()}; give it .contiguous() data"
                )
        for parameter, group in moved:
            self._update(parameter, group)
        return loss

    def _update(self, parameter: nn.Parameter, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state.update(self._zeros(parameter))
        state["step"] += 1
        weight, gradient = parameter.view(-1), parameter.grad.reshape(-1)
        if "table" not in state:
            _step(weight, gradient.float(), *(state[name].view(-1) for name in MOMENTS), state["step"], group)
            return
        tables = [(table, middles(table)) for table in (state["table"], state["table_sq"])]
        blocks = max(PART, math.ceil(weight.numel() / PARTS)) // BLOCK
        parts = [each.split(blocks * BLOCK) for each in (weight, gradient, *(state[n].view(-1) for n in MOMENTS))]
        largest = [state[f"{name}_largest"].split(blocks) for name in MOMENTS]
        for *of_weight, m, v, largest_m, largest_v in zip(*parts, *largest, strict=True):
            stored = [(m, largest_m, *tables[0]), (v, largest_v, *tables[1])]
            _step_stored(*of_weight, stored, state["step"], group)

    def _zeros(self, parameter: nn.Parameter) -> dict[str, object]:
        """A parameter's state before its first step."""
        device = parameter.device
        if parameter.numel() < SMALLEST:
            moments = {name: torch.zeros(parameter.shape, dtype=torch.float32, device=device) for name in MOMENTS}
            return {"step": 0, **moments}
        blocks = math.ceil(parameter.numel() / BLOCK)
        state: dict[str, object] = {"step": 0, **self._shared(device)}
        for name in MOMENTS:
            # Any code times a magnitude of zero is zero.
            state[name] = torch.zeros(parameter.shape, dtype=torch.uint8, device=device)
            state[f"{name}_largest"] = torch.zeros(blocks, dtype=torch.float32, device=device)
        return state

    def _shared(self, device: torch.device) -> dict[str, Tensor]:
        """The tables of a device, the same tensors for all parameters there."""
        if device not in self._tables:
            self._tables[device] = (dynamic_table().to(device), dynamic_table(signed=False).to(device))
        table, table_sq = self._tables[device]
        return {"table": table, "table_sq": table_sq}


def _step_stored(weight: Tensor, gradient: Tensor, stored: list[tuple[Tensor, ...]], step: int, group: dict) -> None:
    """`_step` with moments as they are stored: codes, magnitudes, table and the table's middles of each."""
    count = weight.numel()
    m, v = (_dequantized(codes, largest, table) for codes, largest, table, _ in stored)
    _step(weight, gradient.float(), m[:count], v[:count], step, group)
    for moment, (codes, largest, _, between) in zip((m, v), stored, strict=True):
        _quantize(moment, codes, largest, between)


def _step(weight: Tensor, gradient: Tensor, m: Tensor, v: Tensor, step: int, group: dict) -> None:
    """Adam's step from a float32 gradient, both moments and the weight in place."""
    beta1, beta2 = group["betas"]
    m.lerp_(gradient, 1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    size = -group["lr"] / (1 - beta1**step)
    if weight.dtype == torch.float32:
        weight.addcdiv_(m, root, value=size)
    else:
        # In float32, or wider, and rounded once.
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight.copy_(weight.to(wide, copy=True).addcdiv_(m.to(wide), root.to(wide), value=size))


def _dequantized(codes: Tensor, largest: Tensor, table: Tensor) -> Tensor:
    """(n,) codes and the magnitudes of their blocks -> (ceil(n / 256) * 256,) float32, the end padded with zeros."""
    values = table.index_select(0, codes.int())
    if missing := -values.numel() % BLOCK:
        values = F.pad(values, (0, missing))
    values.view(-1, BLOCK).mul_(largest.unsqueeze(1))
    return values


def _quantize(moment: Tensor, codes: Tensor, largest: Tensor, between: Tensor) -> None:
    """Store a padded moment, which is used up, as the nearest codes and its blocks' largest magnitudes."""
    by_block = moment.view(-1, BLOCK)
    torch.linalg.vector_norm(by_block, math.inf, 1, out=largest)
    # A block of zeros stays one.
    by_block.div_(largest.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1))
    codes.copy_(torch.bucketize(moment[: codes.numel()], between, out_int32=True))
