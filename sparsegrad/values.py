"""Questions about values, and what becomes of them where a tensor is fake: a shape without values (FakeTensorMode)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from sparsegrad.errors import SparseGradError


def passes(condition: Tensor) -> bool:
    """`bool(condition)`, for a check of values; a fake tensor has none to object to, and passes."""
    try:
        return bool(condition)
    except DataDependentOutputException:
        return True


def check_finite(gradient: Tensor) -> None:
    """Raise `SparseGradError` for a weight gradient with a NaN or an infinity."""
    low, high = torch.aminmax(gradient)
    if not passes(torch.isfinite(low) & torch.isfinite(high)):
        raise SparseGradError("a weight gradient holds NaN or infinity; lower the loss scale or check the batches")
