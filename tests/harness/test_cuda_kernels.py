"""Each cause by which CUDA allocates otherwise than the CPU, in bytes that follow from shapes."""

import csv
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness.cards import card
from benchmarks.harness.cuda_kernels import CudaKernels, Unmodelled, workspace_bytes
from benchmarks.harness.memory import Tracker

KIB, MIB = 2**10, 2**20
REFERENCE = Path(__file__).parents[2] / "benchmarks" / "reference"


class Run:
    """Code on fake tensors of a card under a tracker that sees what was made before as live."""

    def __init__(self, gpu="a100"):
        self.kernels = CudaKernels(card(gpu))
        self.tracker = Tracker(fake=True, kernels=self.kernels)

    def __enter__(self):
        self._contexts = [FakeTensorMode(), self.kernels.functions()]
        for context in self._contexts:
            context.__enter__()
        return self

    def __exit__(self, *exception):
        for context in reversed(self._contexts):
            context.__exit__(*exception)

    def added(self, function):
        """Bytes that stay and the most beyond what was there, of a call whose result is held."""
        start, before = self.tracker.position, self.tracker.live_bytes
        with self.tracker:
            held = function()
        result = self.tracker.live_bytes - before, self.tracker.peak(start).bytes - before
        del held
        return result


def leaf(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def test_dropout_saves_a_byte_an_entry():
    with Run() as run:
        x = leaf(4, KIB)
        run.tracker.adopt(x)
        assert run.added(lambda: F.dropout(x, 0.1)) == (16 * KIB + 4 * KIB, 16 * KIB + 4 * KIB)
        for nothing in (lambda: F.dropout(x, 0.0), lambda: F.dropout(x, 0.1, training=False)):
            assert run.added(nothing) == (0, 0)
        y, dy = F.dropout(x, 0.1), torch.empty(4, KIB)
        run.tracker.adopt(y, dy)
        assert run.added(lambda: torch.autograd.backward(y, dy))[0] == 16 * KIB
    # As before outside: the CPU keeps a mask in float.
    assert type(F.dropout(torch.ones(3, requires_grad=True), 0.5).grad_fn).__name__ == "MulBackward0"


def test_autocast_normalises_in_float32_and_keeps_what_it_read():
    with Run() as run:
        x = leaf(4, KIB, dtype=torch.bfloat16)
        weight = leaf(KIB)
        run.tracker.adopt(x, weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            # X in float32 is saved, Y is float32, and four means and deviations are.
            assert run.added(lambda: F.layer_norm(x, (KIB,), weight))[0] == 2 * 16 * KIB + 2 * 4 * 4
        # Without autocast Y is bfloat16, and X itself is saved.
        narrow = weight.bfloat16()
        run.tracker.adopt(narrow)
        assert run.added(lambda: F.layer_norm(x, (KIB,), narrow))[0] == 8 * KIB + 2 * 4 * 4
    # As before outside: on the CPU autocast leaves it alone.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.layer_norm(torch.ones(2, 3, dtype=torch.bfloat16), (3,)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        (lambda x: x.softmax(-1), torch.float32),
        (lambda x: F.log_softmax(x, -1), torch.float32),
        (lambda x: F.softmax(x, -1, dtype=torch.bfloat16), torch.bfloat16),
        (lambda x: x.pow(2), torch.float32),
        (torch.rsqrt, torch.float32),
        (lambda x: x.sum(), torch.float32),
        (lambda x: x.sum(0, keepdim=True), torch.float32),
        (lambda x: x.cumsum(0), torch.float32),
        (lambda x: x.mean(), torch.bfloat16),
        (F.gelu, torch.bfloat16),
        (lambda x: x.long().sum(), torch.int64),
        (lambda x: x.double().softmax(-1), torch.float64),
        (lambda x: x @ x.float().T, torch.bfloat16),
    ],
)
def test_what_autocast_computes_in_is_that_of_cuda(function, dtype):
    """By PyTorch's list of operations that autocast to float32."""
    with Run(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert function(torch.empty(4, 6, dtype=torch.bfloat16)).dtype == dtype


@pytest.mark.parametrize("function", [F.softmax, torch.softmax, torch.Tensor.softmax, F.log_softmax])
def test_softmax_reads_half_without_a_copy(function):
    with Run() as run:
        for dtype, copies in ((torch.half, 0), (torch.bfloat16, 1)):
            x = leaf(KIB, dtype=dtype)
            run.tracker.adopt(x)
            stays, most = run.added(lambda x=x: function(x, dim=-1, dtype=torch.float32))
            assert (stays, most) == (4 * KIB, 4 * KIB * (1 + copies))


def test_softmax_backward_holds_the_product():
    with Run() as run:
        x = leaf(KIB, dtype=torch.half)
        y, dy = x.softmax(0, dtype=torch.float32), torch.empty(KIB)
        run.tracker.adopt(x, y, dy)
        assert run.added(lambda: torch.autograd.backward(y, dy)) == (2 * KIB, 2 * KIB + 4 * KIB)
        x = leaf(KIB)
        y = x.log_softmax(0)
        run.tracker.adopt(x, y)
        assert run.added(lambda: torch.autograd.backward(y, dy)) == (4 * KIB, 4 * KIB)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layer_norm_keeps_its_statistics_in_float(dtype):
    with Run() as run:
        x, weight = leaf(256, 64, dtype=dtype), leaf(64, dtype=dtype)
        run.tracker.adopt(x, weight)
        stays, _ = run.added(lambda: F.layer_norm(x, (64,), weight))
        assert stays == 256 * 64 * dtype.itemsize + 2 * 4 * 256


@pytest.mark.parametrize("tokens", [3072, 3073])
def test_the_gradient_of_an_embedding_sorts_many_tokens(tokens):
    with Run() as run:
        table, indices = leaf(1000, 64), torch.empty(tokens, dtype=torch.int64)
        y, dy = F.embedding(indices, table), torch.empty(tokens, 64)
        run.tracker.adopt(table, indices, y, dy)
        stays, most = run.added(lambda: torch.autograd.backward(y, dy))
        assert stays == 4 * 1000 * 64
        extra = 0 if tokens == 3072 else 4 * 8 * tokens + 4 * 64 * (307 + 1000)
        assert most == stays + extra


def test_coalesce_sorts():
    with Run() as run:
        indices, values = torch.empty(2, KIB, dtype=torch.int64), torch.empty(KIB)
        coo = torch.sparse_coo_tensor(indices, values, (99, 99), is_coalesced=False, check_invariants=False)
        run.tracker.adopt(coo)
        stays, most = run.added(coo.coalesce)
        assert most - stays == 3 * 8 * KIB


# --- attention: 2 x 4 heads x 100 queries x 64


def attention(run, kernel, dtype, kv_heads=4):
    """What a forward keeps beside its output, and the most that backward takes beside the gradients."""
    q = leaf(2, 4, 100, 64, dtype=dtype)
    k, v = (leaf(2, kv_heads, 100, 64, dtype=dtype) for _ in range(2))
    dy = torch.empty(2, 4, 100, 64, dtype=dtype)
    run.tracker.adopt(q, k, v, dy)
    with sdpa_kernel(kernel):
        with run.tracker:
            start = run.tracker.live_bytes
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=kv_heads != 4)
            kept = run.tracker.live_bytes - start - dy.numel() * dtype.itemsize
        position, start = run.tracker.position, run.tracker.live_bytes
        with run.tracker:
            torch.autograd.backward(y, dy)
    gradients = sum(t.numel() * t.itemsize for t in (q, k, v))
    return kept, run.tracker.peak(position).bytes - start - gradients


def test_flash_keeps_the_log_sum_exp():
    with Run() as run:
        kept, extra = attention(run, SDPBackend.FLASH_ATTENTION, torch.bfloat16)
        assert kept == 4 * 2 * 4 * 100 + 2 * 8 + 8  # its random state: two numbers and one
        assert extra == 4 * 2 * 4 * 128 * (1 + 64)
        assert run.kernels.attention_kernel == "flash"
    with Run() as run:
        kept, extra = attention(run, SDPBackend.FLASH_ATTENTION, torch.bfloat16, kv_heads=2)
        assert extra == 4 * 2 * 4 * 128 * (1 + 64) + 2 * 2 * (2 * 4 * 100 * 64)


@pytest.mark.parametrize("dtype", [torch.half, torch.float32])
def test_efficient_keeps_the_log_sum_exp(dtype):
    with Run("t4") as run:
        kept, extra = attention(run, SDPBackend.EFFICIENT_ATTENTION, dtype)
        assert kept == 4 * 2 * 4 * 128  # 100 queries to a multiple of 32; its seeds are on the host
        product = 4 * 2 * 4 * 100 * 64 if dtype == torch.float32 else 0
        assert extra == 4 * 2 * 4 * 100 + 4 * 2 * 4 * 2 * (64 * 64 + 4) + product
        assert run.kernels.attention_kernel == "efficient"


def test_math_keeps_scores():
    with Run("t4") as run:
        kept, _ = attention(run, SDPBackend.MATH, torch.half)
        scores = 4 * 2 * 4 * 100 * 100
        assert kept > scores
        assert run.kernels.attention_kernel == "math"


def test_a_kernel_that_cannot_run_is_an_error():
    with Run("t4") as run, pytest.raises(Unmodelled, match=r"flash takes no compute capability 7\.5"):
        attention(run, SDPBackend.FLASH_ATTENTION, torch.half)


def test_what_only_the_cpu_has_is_an_error():
    with Run() as run, run.tracker:
        x = leaf(1, 1, 8, 8)
        with pytest.raises(Unmodelled, match="for_cpu"):
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)


# --- beside the operations


@pytest.mark.parametrize(("gpu", "size"), [("t4", 8_519_680), ("8.9", 8_519_680), ("h100", 32 * MIB)])
def test_a_workspace_for_each_thread_that_multiplies(gpu, size):
    assert workspace_bytes(card(gpu))["cublas"] == size
    with Run(gpu) as run:
        x, weight, dy = leaf(8, 16), leaf(16, 32), torch.empty(8, 32)
        run.tracker.adopt(x, weight, dy)
        y = []
        assert run.added(lambda: y.append(x @ weight)) == (size + 4 * 8 * 32,) * 2
        assert run.added(lambda: torch.autograd.backward(y.pop(), dy))[0] == size + 4 * (8 * 16 + 16 * 32) - 4 * 8 * 32
        assert run.added(lambda: x @ weight) == (4 * 8 * 32,) * 2


def test_a_product_with_a_bias_has_a_workspace_of_its_own():
    with Run("t4") as run:
        linear, x = nn.Linear(16, 32), leaf(8, 16)
        run.tracker.adopt(linear, x)
        y = []
        assert run.added(lambda: y.append(linear(x)))[0] == 8_519_680 + MIB + 4 * 8 * 32
        assert run.added(lambda: linear(x))[0] == 4 * 8 * 32
        # Its backward multiplies without a bias.
        gradients = 4 * (8 * 16 + 16 * 32 + 32)
        dy = torch.empty(8, 32)
        run.tracker.adopt(dy)
        assert run.added(lambda: torch.autograd.backward(y.pop(), dy))[0] == 8_519_680 + gradients - 4 * 8 * 32


@pytest.mark.parametrize(("impl", "counters"), [("foreach", 0), ("fused", 2 * 4), ("for-loop", 0)])
def test_step_counters_are_on_the_host_unless_fused(impl, counters):
    with Run() as run:
        parameters = [nn.Parameter(torch.empty(KIB)), nn.Parameter(torch.empty(KIB))]
        for parameter in parameters:
            parameter.grad = torch.empty(KIB)
        run.tracker.adopt(parameters, [p.grad for p in parameters])
        optimizer = torch.optim.AdamW(parameters, foreach=impl == "foreach", fused=impl == "fused")
        stays, _ = run.added(optimizer.step)
        assert stays == 2 * 2 * 4 * KIB + counters


def test_a_bias_gradient_has_partial_results():
    with Run("h100") as run:
        dy = torch.empty(4096, 3072)
        run.tracker.adopt(dy)
        result, buffers = 4 * 3072, 96 * MIB + 4 * 24
        for summed in (lambda: dy.sum(0), lambda: dy.mean(0), lambda: dy.view(32, 128, 3072).sum((0, 1))):
            assert run.added(summed) == (result, result + buffers)
        # An extreme is kept in the tensor's own type, a sum in float32.
        assert run.added(lambda: dy.amax(0)) == (result, result + buffers)
        half = dy.bfloat16()
        run.tracker.adopt(half)
        assert run.added(lambda: half.sum(0)) == (result // 2, result // 2 + buffers)
        assert run.added(lambda: half.amax(0)) == (result // 2, result // 2 + 48 * MIB + 4 * 24)
        assert run.added(lambda: torch.linalg.vector_norm(dy, 2, 0)) == (result, result + buffers)
        assert run.added(lambda: dy[:512].sum(0)) == (result, result)


def test_eigenvectors_take_four_matrices_more():
    rows = list(csv.DictReader((REFERENCE / "h100" / "eigenvectors.csv").open(newline="")))
    with Run("h100") as run:
        for row in rows:
            dtype, size = getattr(torch, row["dtype"]), int(row["size"])
            if size < 64:  # a few KiB
                continue
            a = torch.empty(size, size, dtype=dtype)
            run.tracker.adopt(a)
            values = torch.empty(size, dtype=dtype)
            stays, most = run.added(lambda a=a, values=values: torch.linalg.eigh(a, out=(values, a)))
            assert most - stays == int(row["temporary_bytes"]), row
    assert 4.0 < most / (8 * 11008**2) < 4.1


def test_orthonormal_columns_take_room():
    # Measured on an H100, beside Q and R.
    for rows, columns, dtype, bytes_measured in (
        (3072, 40, torch.float64, 6_291_908),
        (384, 384, torch.float32, 3_671_684),
        (3072, 3072, torch.float32, 14_692_484),
    ):
        with Run("h100") as run:
            a = torch.empty(rows, columns, dtype=dtype)
            run.tracker.adopt(a)
            stays, most = run.added(lambda a=a: torch.linalg.qr(a))
            assert stays == (rows * columns + columns**2) * dtype.itemsize
            assert most - stays == bytes_measured


def test_a_sparse_product_turns_its_result():
    rows, columns, entries = 256, 512, 300
    with Run() as run:
        indices, values = torch.zeros(2, entries, dtype=torch.int64), torch.empty(entries)
        sparse = torch.sparse_coo_tensor(indices, values, (rows, columns), check_invariants=False)
        dense, total = torch.empty(columns, columns), torch.empty(rows, columns)
        run.tracker.adopt(indices, values, dense, total)
        kept = sum(workspace_bytes(card("a100"))[name] for name in ("cublas",))
        stays, most = run.added(lambda: total.addmm_(sparse, dense))
        assert most - stays == 4 * rows * columns + 24 * entries + 4 * (rows + 1)
        assert stays <= kept


def test_the_largest_of_many_are_counted_by_blocks():
    with Run("h100") as run:
        x = torch.empty(2_359_296)
        run.tracker.adopt(x)
        # 132 x 6 blocks of 256 threads, 12 entries each: 768 of 3072. Measured on an H100: 401,683 bytes.
        stays, most = run.added(lambda: x.topk(26_880, sorted=False))
        assert (stays, most - stays) == (12 * 26_880, 401_683)
        assert run.added(lambda: x[:4096].topk(10, sorted=False)) == (120, 120)


def test_what_the_hosts_generator_permutes_is_on_the_host():
    with Run() as run:
        generator = torch.Generator()
        assert run.added(lambda: torch.randperm(4096, generator=generator)) == (0, 0)
        moved = lambda: torch.randperm(4096, generator=generator)[:100].sort().values.to(torch.int32)  # noqa: E731
        assert run.added(moved) == (400, 400)
