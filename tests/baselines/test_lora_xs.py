"""LoRA-XS: what stays, and where R begins."""

import pytest
import torch
from torch import nn

from baselines.lora_xs import LoRAXSLinear


@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(5, 11, 3), (13, 2, 1), (6, 6, 6)])
def test_what_stays_is_the_truncated_decomposition(d_in, d_out, rank):
    torch.manual_seed(0)
    source = nn.Linear(d_in, d_out, dtype=torch.float64)
    layer = LoRAXSLinear(source, rank)
    U, S, Vt = torch.linalg.svd(source.weight.detach())
    torch.testing.assert_close(layer.B @ layer.A, U[:, :rank] * S[:rank] @ Vt[:rank], rtol=1e-11, atol=1e-12)
    # A has orthonormal rows, so that the singular values are B's.
    torch.testing.assert_close(layer.A @ layer.A.T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.B.norm(dim=0), S[:rank], rtol=1e-12, atol=0)
    assert [name for name, p in layer.named_parameters() if p.requires_grad and name != "bias"] == ["R"]


def test_r_begins_normal_and_small():
    torch.manual_seed(0)
    layer = LoRAXSLinear(nn.Linear(120, 110), 100)
    R = layer.R.detach()
    # 10 000 draws: the error of a standard deviation is 0.7 %, that of a mean 1 % of it.
    assert float(R.std()) == pytest.approx(1e-5, rel=0.03)
    assert abs(float(R.mean())) < 4e-7
    # A uniform distribution ends at 1.73 standard deviations; a normal one has 0.3 % beyond three.
    assert 0.001 < float((R.abs() > 3e-5).float().mean()) < 0.006
