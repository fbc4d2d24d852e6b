"""What the transition matrices are for: in their basis, held-out gradients of the real encoder are sparser.

And a fixed support chosen in it without a dense sum is as good as one chosen with it.

The bases come from 30 steps on TREC; the gradients from batches of the validation split, which no step has seen.
"""

from statistics import mean

import pytest
import torch

from benchmarks.harness.spec import RunSpec
from sparsegrad import calibrate, choose_entries, fixed_ranks
from sparsegrad.adapted import weight_shape
from sparsegrad.gradients import stream_gradients
from sparsegrad.support import kept_energy

STEPS, HELD_OUT, DENSITY = 10, 2, 0.01


def random_orthogonal(d, generator):
    return torch.linalg.qr(torch.randn(d, d, generator=generator)).Q


@pytest.fixture(scope="module")
def energies():
    """kind -> variant -> mean share of the energy in the top 1 % of held-out gradients."""
    workload = RunSpec(method="sparsegrad", model="minilm-l6", batch=16, seq=32).workload()
    model = workload.build()
    layers = workload.layers(model)
    batches = workload.batches()
    bases = calibrate(model, layers, (next(batches) for _ in range(STEPS)), workload.run_backward)

    object.__setattr__(workload.text, "train", workload.text.validation)
    held_out = workload.batches()
    generator = torch.Generator().manual_seed(0)
    random = {kind: [random_orthogonal(m.shape[0], generator) for m in (b.U, b.V)] for kind, b in bases.items()}
    found = {kind: {} for kind in layers}
    for _ in range(HELD_OUT):
        model.zero_grad()
        workload.run_backward(model, next(held_out))
        for kind, names in layers.items():
            U, V = bases[kind].U, bases[kind].V
            R_in, R_out = random[kind]
            for name in names:
                G = model.get_submodule(name).weight.grad
                for variant, rotated in {
                    "raw": G,
                    "basis": V @ G @ U.T,
                    "U transposed": V @ G @ U,
                    "V transposed": V.T @ G @ U.T,
                    "U random": V @ G @ R_in.T,
                    "V random": R_out @ G @ U.T,
                    "both random": R_out @ G @ R_in.T,
                }.items():
                    found[kind].setdefault(variant, []).append(kept_energy(rotated, DENSITY))
    return {kind: {variant: mean(shares) for variant, shares in by.items()} for kind, by in found.items()}


@pytest.mark.parametrize("other", ["raw", "U transposed", "V transposed", "U random", "V random", "both random"])
@pytest.mark.parametrize("kind", ["up", "down"])
def test_the_basis_holds_more_of_the_energy(energies, kind, other, record_property):
    record_property("energies", energies[kind])
    assert energies[kind]["basis"] > energies[kind][other]


def test_a_fixed_support_holds_the_energy_that_a_dense_sum_would_choose():
    workload = RunSpec(method="sparsegrad-fixed", model="minilm-l6", batch=8, seq=16).workload()
    model = workload.build()
    layers = workload.layers(model)
    model.eval()  # no dropout: the same gradients at every pass
    stream = workload.batches()
    batches = [next(stream) for _ in range(8)]
    nnz = 1000
    ranks = {kind: fixed_ranks(weight_shape(model.get_submodule(names[0])), nnz=nnz) for kind, names in layers.items()}
    bases = calibrate(model, layers, batches[:3], workload.run_backward, ranks)
    chosen = choose_entries(model, layers, bases, batches[3:7], workload.run_backward, nnz=nnz)

    def energies(some):
        found = {}

        def add(kind, name, dy, x):
            basis, gradient = bases[kind], dy.T @ x
            rotated = gradient @ basis.U.T if basis.V is None else basis.V @ gradient
            found[name] = found.get(name, 0) + rotated.square().flatten()

        stream_gradients(model, layers, some, workload.run_backward, add)
        return found

    seen, held_out = energies(batches[3:7]), energies(batches[7:])
    for name, index in chosen.items():
        energy = held_out[name]
        assert energy[index.long()].sum() > 0.95 * energy[seen[name].topk(nnz).indices].sum()
