"""VeRA: what its layers share, where they begin, and peft's."""

import copy

import pytest
import torch
from torch import nn

from baselines.method import Setting
from baselines.registry import get
from baselines.vera import SharedMatrices

FLOAT64 = {"rtol": 1e-12, "atol": 1e-13}
D_IN, D_HIDDEN = 12, 20


def applied(rank, dtype=torch.float64):
    """Two layers of unlike shapes under the method, with d and b random."""
    model = nn.Sequential(nn.Linear(D_IN, D_HIDDEN), nn.GELU(), nn.Linear(D_HIDDEN, D_IN)).to(dtype)
    plain = copy.deepcopy(model)
    method = get("vera")(rank, Setting({"up": ["0"], "down": ["2"]}, train_rest="none"))
    method.prepare(model, iter(()))
    return method, model, plain


def test_all_layers_share_one_pair_as_large_as_the_largest_need():
    method, model, _ = applied(5)
    A, B = method.basis_tensors(model)
    assert (A.shape, B.shape) == ((5, D_HIDDEN), (D_HIDDEN, 5))
    for layer, d_in, d_out in ((model[0], D_IN, D_HIDDEN), (model[2], D_HIDDEN, D_IN)):
        assert (layer.A.shape, layer.B.shape) == ((5, d_in), (d_out, 5))
        assert layer.A.untyped_storage().data_ptr() == A.untyped_storage().data_ptr()
        assert layer.B.untyped_storage().data_ptr() == B.untyped_storage().data_ptr()


@pytest.mark.parametrize("moved", [copy.deepcopy, lambda model: model.float()])
def test_copies_and_moves_keep_one_pair(moved):
    method, model, _ = applied(5)
    model = moved(model)
    assert len(list(method.basis_tensors(model))) == 2
    assert model[0].shared is model[2].shared


def test_where_it_begins():
    _, model, _ = applied(5)
    for layer in (model[0], model[2]):
        assert (layer.lambda_d == 0.1).all()
        assert not layer.lambda_b.any()
    # He et al.: uniform with a standard deviation of sqrt(2 / fan_in), so of bound sqrt(6 / fan_in).
    rank, d_in = 50, 400
    torch.manual_seed(0)
    shared = SharedMatrices(rank, 300, d_in, torch.float32, torch.device("cpu"))
    for matrix, fan_in in ((shared.A, d_in), (shared.B, rank)):
        bound = (6 / fan_in) ** 0.5
        assert 0.99 * bound < matrix.abs().max() <= bound
        assert float(matrix.std()) == pytest.approx((2 / fan_in) ** 0.5, rel=0.02)


def test_a_rank_above_the_sides_trains_more():
    # The paper's own for RoBERTa-base: 1024, for 768 x 768.
    rank = 40
    _, model, _ = applied(rank)
    assert len(model[0].lambda_d) == rank > D_HIDDEN
    assert get("vera")(None, Setting({})).budget == 256


@pytest.mark.parametrize("rank", [3, 40])
def test_equals_peft(rank):
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    method, ours, plain = applied(rank)
    theirs = peft.get_peft_model(plain, peft.VeraConfig(r=rank, target_modules=["0", "2"]))
    theirs = theirs.double().base_model.model
    with torch.no_grad():
        for matrix, its in zip(method.basis_tensors(ours), (theirs[0].vera_A, theirs[0].vera_B), strict=True):
            matrix.copy_(its["default"])
        for own, its in ((ours[0], theirs[0]), (ours[2], theirs[2])):
            assert torch.equal(own.lambda_b, its.vera_lambda_b["default"])
            for parameter, other in ((own.lambda_d, its.vera_lambda_d), (own.lambda_b, its.vera_lambda_b)):
                other["default"].copy_(nn.init.normal_(parameter))
    x = torch.randn(6, D_IN, dtype=torch.float64, requires_grad=True)
    x_theirs = x.detach().clone().requires_grad_()
    dy = torch.randn(6, D_IN, dtype=torch.float64)
    y, y_theirs = ours(x), theirs(x_theirs)
    y.backward(dy)
    y_theirs.backward(dy)
    torch.testing.assert_close(y, y_theirs, **FLOAT64)
    torch.testing.assert_close(x.grad, x_theirs.grad, **FLOAT64)
    for own, its in ((ours[0], theirs[0]), (ours[2], theirs[2])):
        torch.testing.assert_close(own.lambda_d.grad, its.vera_lambda_d["default"].grad, **FLOAT64)
        torch.testing.assert_close(own.lambda_b.grad, its.vera_lambda_b["default"].grad, **FLOAT64)
