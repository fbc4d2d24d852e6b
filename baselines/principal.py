"""The principal directions of a weight: what PiSSA and LoRA-XS begin from."""

from __future__ import annotations

import torch
from torch import Tensor

# Directions beyond the wanted ones, and passes over the weight, of the randomised decomposition. A weight's spectrum
# falls slowly: of an encoder's 384 x 1536 weights the 7 and 32 directions found held 0.998 and more of the energy of
# the exact ones, and 0.987 with half the passes.
OVERSAMPLING, PASSES = 8, 8


def principal_directions(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of a weight (D_out, D_in), in at least float32.

    Exact, but for few directions of a large weight: fewer, with `OVERSAMPLING`, than a quarter of the smaller side are
    found by a randomised decomposition (Halko et al., SIAM Review 2011), as PiSSA's section 3 recommends, which draws
    from torch's generator.

    Returns:
        U (D_out, rank), S (rank,) falling, V (D_in, rank).
    """
    weight = weight.detach()
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    width = rank + OVERSAMPLING
    if 4 * width < min(weight.shape):
        U, S, V = torch.svd_lowrank(wide, q=width, niter=PASSES)
    else:
        U, S, Vt = torch.linalg.svd(wide, full_matrices=False)
        V = Vt.T
    return U[:, :rank], S[:rank], V[:, :rank]
