"""The principal directions of a weight: exact where that is cheap, nearly so elsewhere."""

import pytest
import torch

from baselines.principal import OVERSAMPLING, principal_directions
from benchmarks.harness.memory import Tracker
from benchmarks.harness.predict import predict
from benchmarks.harness.protocol import track
from benchmarks.harness.spec import RunSpec


def with_spectrum(d_out, d_in, values):
    """A float64 weight with the given singular values, and its singular vectors."""
    count = len(values)
    U = torch.linalg.qr(torch.randn(d_out, count, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(d_in, count, dtype=torch.float64)).Q
    return U * values @ V.T, U, V


def assert_same_up_to_sign(found, expected, tolerance):
    overlaps = (found * expected).sum(0).abs()
    torch.testing.assert_close(overlaps, torch.ones_like(overlaps), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(11, 5, 3), (5, 11, 5), (1, 7, 1), (60, 80, 15)])
def test_exact_where_a_side_is_small_or_the_rank_large(d_out, d_in, rank):
    torch.manual_seed(0)
    values = torch.arange(min(d_out, d_in), 0, -1, dtype=torch.float64)
    weight, U, V = with_spectrum(d_out, d_in, values)
    found_U, found_S, found_V = principal_directions(weight, rank)
    torch.testing.assert_close(found_S, values[:rank], rtol=1e-12, atol=0)
    assert_same_up_to_sign(found_U, U[:, :rank], 1e-12)
    assert_same_up_to_sign(found_V, V[:, :rank], 1e-12)


@pytest.mark.parametrize("transposed", [False, True])
def test_few_directions_of_a_large_weight_hold_nearly_all_that_the_best_do(transposed):
    torch.manual_seed(0)
    rank = 3
    assert 4 * (rank + OVERSAMPLING) < 90
    # It falls as slowly as an encoder's: by half over the first 16.
    values = torch.arange(1, 91, dtype=torch.float64).pow(-0.25)
    weight, _, _ = with_spectrum(120, 90, values)
    weight = weight.T if transposed else weight
    U, S, V = principal_directions(weight.float(), rank)
    assert {each.dtype for each in (U, S, V)} == {torch.float32}
    for Q in (U, V):
        torch.testing.assert_close(Q.T @ Q, torch.eye(rank), rtol=0, atol=1e-5)
    energy = float((U.double().T @ weight).square().sum() / values[:rank].square().sum())
    assert 0.99 < energy < 1 + 1e-5
    torch.testing.assert_close(U.T @ weight.float() @ V, S.diag(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["pissa", "lora-xs"])
def test_a_prediction_is_the_tracked_run_where_it_is_randomised(method):
    spec = RunSpec(method, 2, layer=(56, 48), batch=2, seq=3, rounds=0, dtype="bfloat16")
    done = track(spec, spec.workload(), Tracker())
    real, predicted = done.peaks(), predict(spec)
    assert (predicted.status, predicted.reason) == ("ok", None)
    assert {name: getattr(predicted, name) for name in real} == real
