"""The transition matrices against the explicit HOSVD, their orientation, and what calibrating leaves behind."""

import copy

import pytest
import torch
from torch import nn

from sparsegrad import Ranks, SparseGradError, SparseGradLinear, StreamingHOSVD, TransitionMatrices, calibrate
from sparsegrad.support import kept_energy

D_IN, D_HIDDEN = 5, 7
LAYERS = {"up": ["0.up", "1.up"], "down": ["0.down", "1.down"]}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(D_IN)
        self.up = nn.Linear(D_IN, D_HIDDEN)
        self.down = nn.Linear(D_HIDDEN, D_IN, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def blocks(dtype=torch.float64) -> nn.Sequential:
    return nn.Sequential(Block(), Block()).to(dtype)


def batches(count: int = 3, dtype=torch.float64) -> list[torch.Tensor]:
    return [torch.randn(2, 4, D_IN, dtype=dtype) for _ in range(count)]


def backward(model: nn.Module, batch: torch.Tensor) -> None:
    model(batch).square().sum().backward()


def explicit_hosvd(gradients: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, its singular values, V, its singular values: the stack D_in x D_out x N, unfolded and decomposed."""
    stack = torch.stack([g.double().T for g in gradients], dim=2)
    d_in, d_out, _ = stack.shape
    left_in, s_in, _ = torch.linalg.svd(stack.reshape(d_in, -1))
    left_out, s_out, _ = torch.linalg.svd(stack.transpose(0, 1).reshape(d_out, -1))
    return left_in.T, s_in, left_out.T, s_out


def misalignment(rows: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest 1 - |cosine| between rows of the same place: zero where they agree up to sign."""
    return float((1 - (rows.double() * expected).sum(1).abs()).max())


def decompose(gradients, dtype) -> TransitionMatrices:
    d_out, d_in = gradients[0].shape
    hosvd = StreamingHOSVD(d_out, d_in, dtype=dtype)
    for gradient in gradients:
        hosvd.update(gradient)
    assert hosvd.count == len(gradients)
    return hosvd.transition_matrices(dtype)


def ordinary_gradients(model, names, inputs) -> list[torch.Tensor]:
    model = copy.deepcopy(model)
    found = []
    for batch in inputs:
        model.zero_grad()
        backward(model, batch)
        found += [model.get_submodule(name).weight.grad.clone() for name in names]
    return found


# Streaming HOSVD


@pytest.mark.parametrize(("d_out", "d_in", "count"), [(5, 3, 4), (3, 5, 4), (7, 7, 3), (11, 2, 9), (1, 3, 5)])
def test_streaming_hosvd_is_the_explicit_one(d_out, d_in, count):
    gradients = [torch.randn(d_out, d_in, dtype=torch.float64) for _ in range(count)]
    U, s_in, V, s_out = explicit_hosvd(gradients)
    bases = decompose(gradients, torch.float64)
    assert bases.U.shape == (d_in, d_in)
    assert bases.V.shape == (d_out, d_out)
    assert misalignment(bases.U, U) < 1e-12
    assert misalignment(bases.V, V) < 1e-12
    # Rows by falling singular value: what row j of the basis takes out of the unfolding is the j-th of them.
    flat_in = torch.cat([g.T for g in gradients], dim=1)
    flat_out = torch.cat(gradients, dim=1)
    torch.testing.assert_close((bases.U @ flat_in).norm(dim=1), s_in, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((bases.V @ flat_out).norm(dim=1), s_out, rtol=1e-10, atol=1e-10)
    assert (s_in.diff() <= 0).all()


def test_directions_that_no_gradient_has_complete_the_basis():
    gradient = torch.randn(7, 2, dtype=torch.float64) @ torch.randn(2, 5, dtype=torch.float64)  # rank 2
    bases = decompose([gradient], torch.float64)
    U, _, V, _ = explicit_hosvd([gradient])
    assert misalignment(bases.U[:2], U[:2]) < 1e-12
    assert misalignment(bases.V[:2], V[:2]) < 1e-12
    assert (bases.U[2:] @ gradient.T).abs().max() < 1e-7  # the square root of float64's rounding
    for matrix in (bases.U, bases.V):
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64), rtol=0, atol=1e-12)


def test_float32_bases_are_orthogonal_and_lead_with_the_same_directions():
    d_out, d_in = 61, 48
    # Singular values that halve: three of them are well above what float32 Gram matrices resolve.
    p, q = torch.linalg.qr(torch.randn(d_out, 6)).Q, torch.linalg.qr(torch.randn(d_in, 6)).Q
    gradients = [(p * 0.5 ** torch.arange(6)) @ torch.randn(6, 6) @ (q * 0.5 ** torch.arange(6)).T for _ in range(5)]
    bases = decompose(gradients, torch.float32)
    assert bases.U.dtype == bases.V.dtype == torch.float32
    for matrix in (bases.U.double(), bases.V.double()):
        assert (matrix @ matrix.T - torch.eye(len(matrix))).abs().max() < 1e-6
    U, _, V, _ = explicit_hosvd(gradients)
    assert misalignment(bases.U[:3], U[:3]) < 1e-6
    assert misalignment(bases.V[:3], V[:3]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("d_out", "d_in"), [(7, 5), (523, 300)])  # 523: three blocks of rows, the last one odd
def test_gram_matrices_accumulate_in_float32_within_the_stated_error(dtype, d_out, d_in):
    count = 200 if d_out == 7 else 4
    gradients = [torch.randn(d_out, d_in).to(dtype) for _ in range(count)]
    hosvd = StreamingHOSVD(d_out, d_in, dtype=dtype)
    for gradient in gradients:
        hosvd.update(gradient)
    for side, entries, terms in (
        (hosvd.side_in, d_out, [g.double().T @ g.double() for g in gradients]),
        (hosvd.side_out, d_in, [g.double() @ g.double().T for g in gradients]),
    ):
        assert {block.dtype for block in side.blocks} == {torch.float32}
        exact = sum(terms)
        scale = exact.diagonal().sqrt()
        error = (side.lower() - exact).tril() / scale[:, None] / scale
        assert error.abs().max() < 2**-24 * (entries + count)
    assert hosvd.transition_matrices(dtype).U.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_bases_of_several_blocks_are_those_of_the_whole_gram_matrix(dtype):
    d_out, d_in = 523, 300
    gradients = [torch.randn(d_out, d_in, dtype=torch.float64).to(dtype) for _ in range(3)]
    bases = decompose(gradients, torch.float64 if dtype == torch.float64 else dtype)
    for matrix, side in ((bases.U, [g.T for g in gradients]), (bases.V, gradients)):
        gram = sum(g.double() @ g.double().T for g in side)
        rotated = matrix.double() @ gram @ matrix.double().T
        values = torch.linalg.eigvalsh(gram).flip(0)
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(rotated, values.diag(), rtol=0, atol=tolerance * float(values[0]))


def test_a_gradient_is_not_copied_as_a_whole(allocations):
    d_out, d_in = 700, 900
    hosvd = StreamingHOSVD(d_out, d_in, dtype=torch.bfloat16)
    gradient = torch.randn(d_out, d_in).bfloat16()
    with allocations() as made:
        hosvd.update(gradient)
    assert 0 < made.largest <= 900 * 256 * 4


# (k_out, k_in) of a 700 x 300 weight: a side is not wanted, sketched (2) or exact; and with how many tokens G is made
# whole: never, always, or where it is no larger than its factors, from 210 tokens on. Two sketches, of 16 test
# directions each: (T + 64) 700 x 300 multiplications against 64 T (700 + 300).
FACTORED = {
    (700, 0): "never",
    (0, 300): "never",
    (2, 0): "never",
    (0, 2): "never",
    (2, 2): "never",
    (2, 300): "where it is small",
    (700, 2): "where it is small",
    (700, 300): "always",
}


@pytest.mark.parametrize("tokens", [209, 211])
@pytest.mark.parametrize("ranks", FACTORED)
def test_factors_add_what_their_product_does(ranks, tokens, allocations):
    d_out, d_in = 700, 300
    hosvd = StreamingHOSVD(d_out, d_in, Ranks(*ranks), torch.float64)
    pairs = [[torch.randn(tokens, size, dtype=torch.float64) for size in (d_out, d_in)] for _ in range(2)]
    with allocations() as made:
        for dy, x in pairs:
            hosvd.update_product(dy, x)
    assert hosvd.count == 2
    whole = FACTORED[ranks] == "always" or (FACTORED[ranks] != "never" and tokens == 211)
    assert made.sizes.count(8 * d_out * d_in) == (2 if whole else 0)
    assert max(size for size in made.sizes if size != 8 * d_out * d_in) <= 8 * d_out * 256
    gradients = [dy.T @ x for dy, x in pairs]
    for side, exact in (
        (hosvd.side_out, sum(g @ g.T for g in gradients)),
        (hosvd.side_in, sum(g.T @ g for g in gradients)),
    ):
        if type(side).__name__ == "_Gram":
            torch.testing.assert_close(side.lower().tril(), exact.tril(), rtol=0, atol=1e-12 * float(exact.max()))
        elif side is not None:
            expected = exact @ side.directions
            torch.testing.assert_close(side.product, expected, rtol=0, atol=1e-12 * float(exact.max()))


@pytest.mark.parametrize("ranks", [(2, 0), (90, 0)])  # sketched and exact
def test_a_batch_without_tokens_adds_a_gradient_of_zeros(ranks):
    hosvd = StreamingHOSVD(90, 3, Ranks(*ranks))
    hosvd.update_product(torch.ones(2, 90), torch.ones(2, 3))
    size = hosvd.side_out.size()
    hosvd.update_product(torch.ones(0, 90), torch.ones(0, 3))
    assert hosvd.count == 2
    assert hosvd.side_out.size() == size > 0


@pytest.mark.parametrize("ranks", [(2, 2), (700, 0)])
def test_factors_of_two_bytes_are_added_in_float32_block_by_block(ranks, allocations):
    dy, x = torch.randn(1000, 700).bfloat16(), torch.randn(1000, 300).bfloat16()
    hosvd = StreamingHOSVD(700, 300, Ranks(*ranks), torch.bfloat16)
    with allocations() as made:
        hosvd.update_product(dy, x)
    assert 0 < made.largest <= 4 * 700 * 256
    gradient = dy.double().T @ x.double()
    exact = gradient @ gradient.T
    if ranks == (700, 0):
        # As autograd has it, G is rounded to bfloat16 here, each entry by 2^-9 of itself.
        error = hosvd.side_out.lower().tril() - exact.tril()
    else:
        error = hosvd.side_out.product - exact @ hosvd.side_out.directions.double()
    assert error.abs().max() < (2**-8 if ranks == (700, 0) else 1e-5) * exact.max()


def test_a_decomposition_keeps_one_square_matrix_of_float64(allocations):
    size = 400
    hosvd = StreamingHOSVD(size, size, Ranks(size, 0))
    hosvd.update(torch.randn(size, size))
    with allocations() as made:
        hosvd.transition_matrices(torch.float32)
    assert sorted(made.sizes)[-2:] == [4 * size**2, 8 * size**2]
    assert sorted(made.sizes)[-3] <= 64 * 8 * size


def test_signs_do_not_depend_on_the_gradients_sign():
    gradients = [torch.randn(7, 5, dtype=torch.float64) for _ in range(4)]
    bases, opposite = decompose(gradients, torch.float64), decompose([-g for g in gradients], torch.float64)
    for matrix, other in ((bases.U, opposite.U), (bases.V, opposite.V)):
        torch.testing.assert_close(matrix, other, rtol=0, atol=1e-12)
        assert (matrix.gather(1, matrix.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_adds_nothing(value):
    hosvd = StreamingHOSVD(3, 2)
    hosvd.update(torch.ones(3, 2))
    bad = torch.ones(3, 2)
    bad[1, 1] = value
    with pytest.raises(SparseGradError, match="NaN or infinity"):
        hosvd.update(bad)
    assert hosvd.count == 1
    assert torch.equal(hosvd.side_in.lower(), torch.full((2, 2), 3.0, dtype=torch.float64))
    assert torch.equal(hosvd.side_out.lower(), torch.full((3, 3), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("ranks", [(3, 2), (3, 0)])  # whole and from the factors
@pytest.mark.parametrize("bad", ["dy", "x"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_add_nothing(value, bad, ranks):
    factors = {"dy": torch.ones(4, 3), "x": torch.ones(4, 2)}
    hosvd = StreamingHOSVD(3, 2, Ranks(*ranks))
    hosvd.update_product(**factors)
    before = hosvd.side_out.lower()
    factors[bad][1, 1] = value
    with pytest.raises(SparseGradError, match="NaN or infinity"):
        hosvd.update_product(**factors)
    assert hosvd.count == 1
    assert torch.equal(hosvd.side_out.lower(), before)


@pytest.mark.parametrize(("shape", "ranks"), [((3, 2), (3, 2)), ((90, 2), (2, 0))])
def test_no_basis_without_a_gradient(shape, ranks):
    with pytest.raises(SparseGradError, match="0 gradients"):
        StreamingHOSVD(*shape, Ranks(*ranks)).transition_matrices(torch.float32)
    zeros = StreamingHOSVD(*shape, Ranks(*ranks))
    zeros.refine()
    zeros.update(torch.zeros(shape))
    zeros.refine()
    with pytest.raises(SparseGradError, match="all are zero"):
        zeros.transition_matrices(torch.float32)


def test_gradients_whose_squares_overflow_are_refused():
    hosvd = StreamingHOSVD(3, 2)
    hosvd.update(torch.full((3, 2), 1e30))
    with pytest.raises(SparseGradError, match="overflow"):
        hosvd.transition_matrices(torch.float32)
    sketch = StreamingHOSVD(90, 2, Ranks(2, 0))
    sketch.update(torch.full((90, 2), 1e30))
    for question in (sketch.refine, lambda: sketch.transition_matrices(torch.float32)):
        with pytest.raises(SparseGradError, match="overflow"):
            question()


@pytest.mark.parametrize(("U", "V"), [((3, 2), (4, 4)), ((3, 3), (5, 4)), ((3,), (4, 4)), ((0, 3), (4, 4))])
def test_bases_are_rows_of_an_orthogonal_matrix(U, V):
    with pytest.raises(SparseGradError, match="at most as many rows as columns"):
        TransitionMatrices(torch.zeros(U), torch.zeros(V))


@pytest.mark.parametrize("ranks", [(2, 4), (2, 0), (0, 3), (6, 1)])
def test_ranks_take_the_leading_directions(ranks):
    gradients = [torch.randn(6, 4, dtype=torch.float64) for _ in range(3)]
    whole, some = StreamingHOSVD(6, 4, dtype=torch.float64), StreamingHOSVD(6, 4, Ranks(*ranks), dtype=torch.float64)
    for gradient in gradients:
        whole.update(gradient)
        some.update(gradient)
    whole, some = whole.transition_matrices(torch.float64), some.transition_matrices(torch.float64)
    for rank, leading, full in zip(ranks, (some.V, some.U), (whole.V, whole.U), strict=True):
        if rank:
            torch.testing.assert_close(leading, full[:rank], rtol=0, atol=1e-10)
        else:
            assert leading is None


@pytest.mark.parametrize("ranks", [(0, 0), (7, 4), (6, 5), (-1, 4)])
def test_ranks_beyond_the_weight_are_refused(ranks):
    with pytest.raises(SparseGradError, match=f"ranks of a weight of 6 x 4 .* got {ranks[0]} x {ranks[1]}"):
        StreamingHOSVD(6, 4, Ranks(*ranks))


# Sketches: few directions of a large side


def decaying(d_out: int, d_in: int, steps: int) -> list[list[torch.Tensor]]:
    """Gradients whose singular values fall as 1 / sqrt(j), in directions that turn a little in each: step by step."""
    spectrum = torch.arange(1, d_in + 1) ** -0.5
    p, q = torch.linalg.qr(torch.randn(d_out, d_in)).Q, torch.linalg.qr(torch.randn(d_in, d_in)).Q
    return [
        [(p + torch.randn(d_out, d_in) * 0.3 * d_out**-0.5) * spectrum @ torch.randn(d_in, d_in) @ q.T for _ in "12"]
        for _ in range(steps)
    ]


def sketched(steps, k: int, refine: bool, dtype=torch.float32, transposed: bool = False) -> torch.Tensor:
    """(k, D): the leading directions of the rows of the gradients, or of the columns of their transposes."""
    d_out, d_in = steps[0][0].shape
    hosvd = (
        StreamingHOSVD(d_in, d_out, Ranks(0, k), dtype=dtype)
        if transposed
        else StreamingHOSVD(d_out, d_in, Ranks(k, 0), dtype=dtype)
    )
    for gradients in steps:
        if refine:
            hosvd.refine()
        for gradient in gradients:
            hosvd.update(gradient.T if transposed else gradient)
    bases = hosvd.transition_matrices(dtype)
    return bases.U if transposed else bases.V


@pytest.mark.parametrize(("rank", "kind"), [(3, "_Sketch"), (16, "_Sketch"), (43, "_Gram"), (300, "_Gram")])
def test_the_cheaper_way_is_taken(rank, kind):
    # 16 and 8 more, up to a multiple of 16, are 32 test directions; 43 and 22 more are 80, and 4 x 80 > 300.
    hosvd = StreamingHOSVD(300, 20, Ranks(rank, 1))
    assert (type(hosvd.side_out).__name__, type(hosvd.side_in).__name__) == (kind, "_Gram")


def test_refined_sketches_hold_the_energy_of_exact_directions():
    k, steps = 16, decaying(300, 48, 10)
    gram = sum(g.double() @ g.double().T for gradients in steps for g in gradients)
    best = torch.linalg.eigvalsh(gram)[-k:].sum()
    share = {}
    for refine in (True, False):
        rows = sketched(steps, k, refine).double()
        assert (rows @ rows.T - torch.eye(k)).abs().max() < 1e-6
        share[refine] = float(((rows @ gram) * rows).sum() / best)
    assert share[True] > 0.99
    assert share[True] > share[False]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
def test_sketches_of_few_dimensions_are_exact(transposed, refine, dtype, limit):
    d_out, k = 300, 6  # 16 test directions, of which 12 stay: as many as the gradients span
    p = torch.linalg.qr(torch.randn(d_out, 12, dtype=torch.float64)).Q * 0.6 ** torch.arange(12)
    steps = [[(p @ torch.randn(12, 24, dtype=torch.float64)).to(dtype) for _ in range(3)] for _ in range(4)]
    rows = sketched(steps, k, refine, dtype, transposed)
    _, _, V, _ = explicit_hosvd([g for gradients in steps for g in gradients])
    assert misalignment(rows, V[:k]) < limit
    assert (rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("refine", [False, True])
def test_a_sketch_of_gradients_of_less_rank_is_completed(refine):
    column = torch.randn(200, 1, dtype=torch.float64)
    rows = sketched([[column, 2 * column], [column]], 5, refine, torch.float64)
    torch.testing.assert_close(rows @ rows.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)
    assert misalignment(rows[:1], (column / column.norm()).T) < 1e-12


def test_sketches_do_not_touch_the_global_generator_and_agree():
    steps = decaying(120, 12, 3)
    state = torch.get_rng_state()
    first = sketched(steps, 4, True)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(sketched(steps, 4, True), first)


def test_calibrate_refines_between_steps(monkeypatch):
    events = []
    monkeypatch.setattr(StreamingHOSVD, "refine", lambda self: events.append("refine"))

    def noting(model, batch):
        events.append("backward")
        backward(model, batch)

    calibrate(blocks(), LAYERS, batches(2), noting)
    assert events == ["refine", "refine", "backward"] * 2


# Orientation: planted directions


def planted(d_out: int, d_in: int, count: int) -> list[torch.Tensor]:
    """Gradients in the span of two fixed directions on each side, differently mixed."""
    p = torch.linalg.qr(torch.randn(d_out, 2, dtype=torch.float64)).Q
    q = torch.linalg.qr(torch.randn(d_in, 2, dtype=torch.float64)).Q
    return [p @ torch.randn(2, 2, dtype=torch.float64) @ q.T for _ in range(count)]


@pytest.mark.parametrize(("d_out", "d_in"), [(37, 31), (31, 37), (32, 32)])
def test_v_g_ut_concentrates_the_gradient_and_no_transpose_does(d_out, d_in):
    gradients = planted(d_out, d_in, 6)
    bases = decompose(gradients[:-1], torch.float64)
    unseen = gradients[-1]

    def leading(U, V):
        """Share of the energy in the leading 2 x 2 corner; and in as many entries, wherever they are."""
        rotated = V @ unseen @ U.T
        return float(rotated[:2, :2].square().sum() / rotated.square().sum()), kept_energy(rotated, 4 / (d_out * d_in))

    U, V = bases.U, bases.V
    corner, kept = leading(U, V)
    assert corner == pytest.approx(1, abs=1e-12)
    assert kept == pytest.approx(1, abs=1e-12)
    for wrong in ((U.T, V), (U, V.T), (U.T, V.T)):
        corner, kept = leading(*wrong)
        # A direction that is not a basis row spreads over some thirty of them.
        assert corner < 0.5
        assert kept < 0.75


def test_a_converted_layer_keeps_nearly_all_of_a_planted_gradient(distance):
    d_out, d_in, tokens = 13, 11, 6
    p = torch.linalg.qr(torch.randn(d_out, 2, dtype=torch.float64)).Q
    q = torch.linalg.qr(torch.randn(d_in, 2, dtype=torch.float64)).Q
    linear = nn.Linear(d_in, d_out, dtype=torch.float64)
    model = nn.Sequential(linear)

    def push(model, batch):
        x, dy = batch
        model(x).backward(dy)

    def sample():
        """X and dL/dY with rows in the two planted directions: so is dL/dY^T X."""
        return torch.randn(tokens, 2, dtype=torch.float64) @ q.T, torch.randn(tokens, 2, dtype=torch.float64) @ p.T

    bases = calibrate(model, {"only": ["0"]}, [sample() for _ in range(5)], push)["only"]
    layer = SparseGradLinear.from_linear(linear, bases.U, bases.V, nnz=4)
    x, dy = sample()
    layer(x).backward(dy)
    kept = bases.V.T @ layer.weight.grad.to_dense() @ bases.U
    assert distance(kept, dy.T @ x) < 1e-10


# Calibration of a model


@pytest.mark.parametrize("training", [True, False])
def test_calibrate_is_the_explicit_hosvd_of_the_ordinary_gradients(training):
    model, inputs = blocks().train(training), batches()
    found = calibrate(model, LAYERS, inputs, backward)
    assert list(found) == ["up", "down"]
    for kind, names in LAYERS.items():
        U, _, V, _ = explicit_hosvd(ordinary_gradients(model, names, inputs))
        assert misalignment(found[kind].U, U) < 1e-10
        assert misalignment(found[kind].V, V) < 1e-10
    assert model.training is training


def test_calibrate_knows_conv1d():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = blocks()
    twin = copy.deepcopy(model)
    for block in twin:
        for name in ("up", "down"):
            linear = getattr(block, name)
            stored = conv1d(linear.out_features, linear.in_features).double()
            stored.weight = nn.Parameter(linear.weight.detach().T.contiguous())
            if linear.bias is not None:
                stored.bias = nn.Parameter(linear.bias.detach())
            setattr(block, name, stored)
    inputs = batches()
    found, expected = calibrate(twin, LAYERS, inputs, backward), calibrate(model, LAYERS, inputs, backward)
    for kind in LAYERS:
        torch.testing.assert_close(found[kind].U, expected[kind].U, rtol=0, atol=1e-9)
        torch.testing.assert_close(found[kind].V, expected[kind].V, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_bases_come_in_the_weights_dtype(dtype):
    found = calibrate(blocks(dtype), LAYERS, batches(dtype=dtype), backward)
    assert {matrix.dtype for bases in found.values() for matrix in (bases.U, bases.V)} == {dtype}


def test_calibrate_calls_a_transformers_model_with_its_batch(tiny):
    model, batch = tiny("bert")
    layers = {"down": [f"bert.encoder.layer.{i}.output.dense" for i in range(2)]}
    found = calibrate(model, layers, [batch, batch])["down"]
    twin = copy.deepcopy(model)
    twin(**batch).loss.backward()
    U, _, V, _ = explicit_hosvd([twin.get_submodule(name).weight.grad for name in layers["down"]])
    # Twice the same gradients: the same directions. Two suffice: float32 resolves the leading ones.
    assert misalignment(found.U[:2], U[:2]) < 1e-4
    assert misalignment(found.V[:2], V[:2]) < 1e-4


def test_the_model_is_as_it_was(unchanged):
    model = blocks()
    model[0].up.weight.requires_grad_(False)  # calibrated all the same, and frozen again
    model[1].norm.weight.requires_grad_(False)
    with unchanged(model):
        calibrate(model, LAYERS, batches(), backward)
    # No hook stays either: gradients arrive and remain.
    backward(model, batches()[0])
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == {
        "0.up.weight",
        "1.norm.weight",
    }


def test_nothing_trains_meanwhile():
    model, seen = blocks(), []

    def watching(model, batch):
        seen.append([parameter.requires_grad for parameter in model.parameters()])
        backward(model, batch)
        assert all(parameter.grad is None for parameter in model.parameters())

    calibrate(model, LAYERS, batches(2), watching)
    assert seen == [[False] * 10] * 2  # of each block the norm's two, up's two and down's one


def test_batches_are_taken_one_at_a_time():
    events = []

    def stream():
        for i in range(3):
            events.append(f"batch {i}")
            yield torch.randn(4, D_IN, dtype=torch.float64)

    def noting(model, batch):
        events.append("backward")
        backward(model, batch)

    calibrate(blocks(), LAYERS, stream(), noting)
    assert events == ["batch 0", "backward", "batch 1", "backward", "batch 2", "backward"]


# Whatever goes wrong, the model is as it was


class Broken(RuntimeError):
    """What a test raises."""


def broken_before(model, batch):
    raise Broken


def broken_after(model, batch):
    backward(model, batch)
    raise Broken


def broken_inside(model, batch):
    """The first block's backward fails after the second's gradients were made."""
    hidden = model[0](batch)
    hidden.register_hook(broken_hook)
    model[1](hidden).square().sum().backward()


def broken_hook(gradient):
    raise Broken


@pytest.mark.parametrize("failing", [broken_before, broken_after, broken_inside])
def test_an_exception_leaves_the_model_as_it_was(failing, unchanged):
    model = blocks()
    model[1].up.weight.requires_grad_(False)
    with unchanged(model), pytest.raises(Broken):
        calibrate(model, LAYERS, batches(), failing)
    backward(model, batches()[0])
    assert model[0].up.weight.grad is not None


def test_an_exception_from_the_batches_leaves_the_model_as_it_was(unchanged):
    def stream():
        yield batches()[0]
        raise Broken

    model = blocks()
    with unchanged(model), pytest.raises(Broken):
        calibrate(model, LAYERS, stream(), backward)


def test_a_nan_names_its_layer_and_leaves_the_model_as_it_was(unchanged):
    model, inputs = blocks(), batches()
    inputs[1][0, 0, 0] = float("nan")
    with unchanged(model), pytest.raises(SparseGradError, match=r"layer '1\.down': .* NaN"):
        calibrate(model, LAYERS, inputs, backward)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"all": ["0.up", "0.down"]}, r"'all' must share one shape .* '0.up' is 7 x 5, '0.down' is 5 x 7"),
        ({"up": ["0.up", "2.up"]}, r"no layer '2.up'; its linear layers end in: up, down"),
        ({"up": [""]}, "no layer ''"),
        ({"norm": ["0.norm"]}, "'0.norm' is a LayerNorm, not a plain linear layer"),
        ({"up": []}, "kind 'up' names no layer"),
        ({}, "layers is empty"),
        ({"a": ["0.up"], "b": ["0.up"]}, "'0.up' is named twice"),
        ({"a": ["0.up", "0.up"]}, "'0.up' is named twice"),
    ],
)
def test_layers_that_do_not_fit_are_refused(layers, message, unchanged):
    model = blocks()
    with unchanged(model), pytest.raises(SparseGradError, match=message):
        calibrate(model, layers, batches(), backward)


@pytest.mark.parametrize("what", ["weight", "layer"])
def test_a_shared_weight_is_refused(what, unchanged):
    model = blocks()
    if what == "weight":
        model[1].up.weight = model[0].up.weight
    else:
        model[1].up = model[0].up
    with unchanged(model), pytest.raises(SparseGradError, match=r"'0\.up' shares its weight with '1\.up'"):
        calibrate(model, {"up": ["0.up"]}, batches(), backward)


def test_gradients_that_are_there_are_not_thrown_away():
    model = blocks()
    backward(model, batches()[0])
    before = [parameter.grad.clone() for parameter in model.parameters()]
    with pytest.raises(SparseGradError, match="zero_grad"):
        calibrate(model, LAYERS, batches(), backward)
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert parameter.requires_grad
        assert torch.equal(parameter.grad, gradient)


def test_no_batch_is_an_error(unchanged):
    model = blocks()
    with unchanged(model), pytest.raises(SparseGradError, match="0 gradients were collected"):
        calibrate(model, LAYERS, [], backward)
