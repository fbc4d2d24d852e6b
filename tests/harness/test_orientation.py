"""What the transition matrices are for: in their basis, held-out gradients of the real encoder are sparser.

The bases come from 30 steps on TREC; the gradients from batches of the validation split, which no step has seen.
"""

from statistics import mean

import pytest
import torch

from benchmarks.harness.spec import RunSpec
from sparsegrad import calibrate
from sparsegrad.support import kept_energy

STEPS, HELD_OUT, DENSITY = 30, 2, 0.01


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
