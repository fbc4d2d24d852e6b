"""The adapter that makes the package a method: how much it calibrates on, what it converts and what it shares."""

import itertools

import pytest
import torch

from baselines.method import Setting
from baselines.registry import get
from sparsegrad import SparseAdam, SparseGradLinear, calibrate, find_layers

KINDS = {"bert": 2, "gpt2": 2, "llama": 3}  # up and down; llama has a gate as well


@pytest.mark.parametrize("steps", [1, 3])
def test_calibrates_on_exactly_as_many_batches_as_asked(steps, build_model, batches, apply):
    model = build_model("bert")
    drawn = []

    def counted():
        for batch in batches(model):
            drawn.append(batch)
            yield batch

    seen = []

    def backward(model, batch):
        seen.append(batch)
        model(**batch).loss.backward()

    setting = Setting(layers=find_layers(model), calibration_steps=steps, backward=backward)
    get("sparsegrad")(0.1, setting).prepare(model, counted())
    assert len(drawn) == steps
    assert [id(batch) for batch in seen] == [id(batch) for batch in drawn]


def test_thirty_steps_unless_asked_otherwise():
    assert Setting(layers={}).calibration_steps == 30  # the paper's


def test_bases_are_those_of_the_first_batches(build_model, batches, apply):
    model, twin, longer = (build_model("bert", torch.float64) for _ in range(3))
    apply("sparsegrad", model, budget=0.1, calibration_steps=2)
    layers = find_layers(twin)
    expected = calibrate(twin, layers, itertools.islice(batches(twin), 2))
    other = calibrate(longer, layers, itertools.islice(batches(longer), 3))
    for kind, names in layers.items():
        basis = model.get_submodule(names[0]).basis
        assert torch.equal(basis.U, expected[kind].U)
        assert torch.equal(basis.V, expected[kind].V)
        assert not torch.equal(basis.U, other[kind].U)


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize(("budget", "kept"), [(0.1, 38), (7, 7), (1.0, 384), (1, 1), (None, 4)])
def test_converts_every_target_with_its_budget(family, budget, kept, build_model, batches, apply):
    # 384 entries in each weight: round(38.4) at a density of 0.1, round(3.84) at the default of 0.01.
    model = build_model(family)
    layers = find_layers(model)
    names = {name for of_kind in layers.values() for name in of_kind}
    apply("sparsegrad", model, budget=budget)
    converted = {name for name, module in model.named_modules() if isinstance(module, SparseGradLinear)}
    assert converted == names
    model(**next(batches(model))).loss.backward()
    for name in names:
        gradient = model.get_submodule(name).weight.grad
        assert gradient.is_sparse
        assert gradient._nnz() == kept


@pytest.mark.parametrize("family", KINDS)
def test_bases_are_shared_by_kind_and_listed_once(family, build_model, apply):
    model = build_model(family)
    layers = find_layers(model)
    method = apply("sparsegrad", model, budget=0.1)
    bases = []
    for names in layers.values():
        of_kind = {id(model.get_submodule(name).basis): model.get_submodule(name).basis for name in names}
        assert len(names) == 2
        assert len(of_kind) == 1
        bases += of_kind.values()
    listed = [tensor.data_ptr() for tensor in method.basis_tensors(model)]
    assert len(listed) == len(set(listed)) == 2 * KINDS[family]
    assert set(listed) == {matrix.data_ptr() for basis in bases for matrix in (basis.U, basis.V)}
    # 16^2 for the hidden side and 24^2 for the inner side of each kind.
    assert sum(tensor.numel() for tensor in method.basis_tensors(model)) == KINDS[family] * (16**2 + 24**2)


def test_counts(build_model, apply):
    model = build_model("bert")
    everything = sum(p.numel() for p in model.parameters())
    shapes = [(24, 16), (16, 24)] * 2
    method = apply("sparsegrad", model, budget=0.1, train_rest="none")
    counts = method.counts(model, shapes)
    # Any entry of W~ may change at some step; 38 of them do at each. The bases are no parameters.
    assert counts.total_params == everything
    assert counts.trainable_params == 4 * 384 + (3 * 16 + 3)
    assert counts.budget_params == 4 * 38


def test_sparse_adam_has_the_weights_and_nothing_else(build_model, apply):
    model = build_model("bert")
    method = apply("sparsegrad", model, budget=0.1)
    sparse, dense = method.optimizers(model, 1e-3)
    assert isinstance(sparse, SparseAdam)
    assert isinstance(dense, torch.optim.AdamW)
    weights = {id(m.weight) for m in model.modules() if isinstance(m, SparseGradLinear)}
    assert {id(p) for group in sparse.param_groups for p in group["params"]} == weights
    assert not weights & {id(p) for group in dense.param_groups for p in group["params"]}


def test_a_failed_calibration_leaves_the_model_alone(build_model, apply):
    model = build_model("bert")
    flags = [p.requires_grad for p in model.parameters()]
    types = [type(m) for m in model.modules()]

    def backward(model, batch):
        raise RuntimeError("no batch")

    with pytest.raises(RuntimeError, match="no batch"):
        apply("sparsegrad", model, budget=0.1, backward=backward)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [type(m) for m in model.modules()] == types
