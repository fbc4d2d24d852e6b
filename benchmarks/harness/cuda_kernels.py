"""What PyTorch allocates on a CUDA card otherwise than on the CPU, cause by cause, for a prediction's fake tensors.

Fake tensors are the CPU's, so each operation returns what its CPU kernel would. What differs on CUDA is put here, from
the sources of PyTorch 2.13 and its neighbours. What the libraries of closed source take for themselves was measured, an
operation at a time; nothing is fitted to a training step.

Above autograd, where other operations run, and so other tensors are saved for backward:
 - Dropout saves a mask of one byte an entry (`native_dropout`); the CPU's keeps a float tensor.
 - A softmax or log-softmax that reads half and is asked for float32 makes no float32 copy of its input (not so
   for bfloat16, which both convert first).
 - Scaled dot-product attention: the kernels of attention.py, which save their output and its log-sum-exp instead of
   scores.

And under autocast, which knows other operations on CUDA than on the CPU (`AUTOCAST_WIDE` and the two behind it): it
takes normalisation, softmax, powers and sums in float32 there, and so saves copies of their inputs. Matrix products and
attention are bfloat16 on both. Left out are operations that transformers' models seldom call, and that the CPU takes
cross entropy in float32 whole, where CUDA does so with its second half.

Inside kernels, what is allocated and freed before they return:
 - Softmax backward holds `grad * output`, as large as its output. Log-softmax has no such temporary.
 - Flash's backward: the gradient of Q accumulated in float32, (B, L to a multiple of 128, H, D to one of 32), two
   float32 numbers a query and head; for grouped K and V their gradients for every head of Q before they are summed.
 - The efficient kernel's backward: one float32 number a query and head, which in float32 it takes from a product as
   large as the output; and the gradient of Q accumulated in float32 in tiles of its own.
 - The gradient of an embedding of more than 3072 tokens: the tokens sorted (four int64 each), and float32 partial sums
   of up to (tokens / 10 + the smaller of tokens and rows) rows.
 - A reduction's partial results, one for each thread: 96 MiB for a bias gradient of 4096 x 3072 (reductions.py).
 - `coalesce` of a COO tensor: flat indices and their sorted order (three int64 an entry). As much for the sort of a
   line of more than 4096 entries, and 520 bytes a thread block for finding the largest of more than 20,000. The three
   are as an H100 measured them with PyTorch 2.11.
 - A sparse matrix times a dense one: the result column by column, and the entries' rows, compressed.
 - Eigenvectors, and the factors Q and R: cuSOLVER's room, for eigenvectors in float64 four matrices of their size. By
   formulas that meet, to the byte, what an H100 measured with CUDA 13.0 for sizes from 64 to 11008, and for six of
   Q and R.

And beside the operations:
 - Layer normalisation keeps its means and deviations in float32, also of half and bfloat16.
 - cuBLAS has a workspace for each thread that multiplies matrices, kept for good: forward's and, from the first
   backward on, autograd's. 8,519,680 bytes each (4096 KiB twice and 16 KiB eight times); 33,554,432 on compute
   capabilities 9, 10 and 12. Neither CUBLAS_WORKSPACE_CONFIG is modelled nor PyTorch 2.15, which is to free them after
   each product.
 - cuBLASLt, which runs a product that adds a bias (`addmm` with a vector) and whose handle is cuBLAS's, has 1 MiB more
   for each thread. Revisions of PyTorch differ in this: in some it shares cuBLAS's. Steps measured with 2.10 and 2.14
   show the 1 MiB, and they decided it here.
 - AdamW's step counters and other tensors made of Python numbers stay on the host; so do the efficient kernel's seeds,
   and what the host's generator permutes until it is moved. Fused AdamW's counters are on the card.
 - Optimizer implementations run as they are, temporaries included: on CUDA torch takes foreach where nothing is named.

What is NOT modelled: cuSOLVER's room for singular values (PiSSA's and LoRA-XS's preparation: a few MiB); flash's
buffers for splitting K at small B x H x L; the efficient kernel's accumulators for K and V where a card's shared memory
is too small for head sizes above 64; partial sums of layer normalisation over more than 65536 rows; the room of scans;
copies that a matrix product makes of inputs with unusual strides; convolutions. Of these the second and the third can
reach megabytes in the methods and models here. cuDNN's attention showed no workspace on an H100.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_map_only

from benchmarks.harness.attention import HALVES, NoKernel, attend, choose
from benchmarks.harness.cards import Card
from benchmarks.harness.reductions import partial_results_bytes

aten = torch.ops.aten
See = Callable[[object], None]

# The kernel that gives the gradient of an embedding sorts its tokens where there are more than this.
UNSORTED_TOKENS = 3072


class Unmodelled(ValueError):
    """An operation of which it is not known what it allocates on a card."""


class CudaKernels:
    """CUDA's kernels for a tracker of fake tensors (`memory.Kernels`), and the functions above autograd.

    >>> kernels = CudaKernels(card("t4"))
    >>> with FakeTensorMode(), kernels.functions(), Tracker(fake=True, kernels=kernels):
    ...     loss = model(x)
    """

    def __init__(self, card: Card):
        self._card = card
        self._workspaces: dict[tuple[str, bool], Tensor] = {}  # library, whether autograd's thread -> workspace
        self._attention: list[str] = []

    @property
    def attention_kernel(self) -> str | None:
        """The attention kernels that were picked, in the order in which they first were; None without attention."""
        return ", ".join(self._attention) or None

    @contextmanager
    def functions(self) -> Iterator[None]:
        """Functions that are made of other operations on CUDA, in place of the CPU's while the context lasts."""
        with torch.library._scoped_library("aten", "IMPL") as library:
            for name, function in (
                ("dropout", _dropout),
                ("softmax.int", partial(_softmax, aten._softmax)),
                ("log_softmax.int", partial(_softmax, aten._log_softmax)),
                ("scaled_dot_product_attention", self._attend),
            ):
                library.impl(name, function, "AutogradCPU")
            for name, function in _under_autocast():
                library.impl(name, function, "AutocastCPU")
            yield

    def __call__(self, func: Callable, args: tuple, kwargs: dict, see: See) -> object:
        """Run an operation; `see` is told of what its kernel allocates besides its result."""
        if func in MATRIX_PRODUCTS:
            self._keep_workspace("cublas", see)
            if func is aten.addmm.default and args[0].dim() == 1:
                self._keep_workspace("cublasLt", see)
        if func is aten.topk.default:
            return _largest(self._card, func, args, kwargs, see)
        if func in REDUCTIONS:
            return _reduce(self._card, func, args, kwargs, see)
        kernel = _KERNELS.get(func)
        return func(*args, **kwargs) if kernel is None else kernel(func, args, kwargs, see)

    def _keep_workspace(self, library: str, see: See) -> None:
        # Autograd has a thread of its own for a card.
        key = library, torch._C._current_autograd_node() is not None
        if key not in self._workspaces:
            self._workspaces[key] = torch.empty(workspace_bytes(self._card)[library], dtype=torch.uint8)
            see(self._workspaces[key])

    def _attend(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
        try:
            kernel = choose(self._card, q, k, v, attn_mask, dropout_p, is_causal, enable_gqa)
        except NoKernel as error:
            raise Unmodelled(str(error)) from None
        if kernel not in self._attention:
            self._attention.append(kernel)
        return attend(kernel, q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def workspace_bytes(card: Card) -> dict[str, int]:
    """What a library's workspace takes for each thread that multiplies matrices with it."""
    cublas = 32 * 2**20 if card.capability[0] in (9, 10, 12) else (2 * 4096 + 8 * 16) * 2**10
    return {"cublas": cublas, "cublasLt": 2**20}


# --- above autograd


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:
    if not train or not p or not input.numel():
        return input
    if p == 1:
        return input * torch.zeros_like(input)
    return torch.native_dropout(input, p, True)[0]


def _softmax(kernel, input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    if input.dtype == torch.half and dtype == torch.float32:
        return kernel(input, dim, True)
    return kernel(input if dtype is None else input.to(dtype), dim, False)


# What autocast runs in float32 on CUDA and does not on the CPU, and what takes a dtype, which is then float32: from
# ATen's autocast_mode.h.
AUTOCAST_WIDE = (
    "layer_norm",
    "native_layer_norm",
    "rms_norm",
    "group_norm",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "pow.Scalar",
    "rsqrt",
    "reciprocal",
    "exp",
    "expm1",
    "log",
    "log10",
    "log2",
    "log1p",
    "sinh",
    "cosh",
    "tan",
    "softplus",
    "logsumexp",
    "cosine_similarity",
)
AUTOCAST_SUMS = ("cumsum", "cumprod", "sum", "sum.dim_IntList", "linalg_vector_norm")
AUTOCAST_SOFTMAX = ("softmax.int", "log_softmax.int")


def _under_autocast() -> Iterator[tuple[str, Callable]]:
    """Operations and what CUDA's autocast makes of them."""
    for policy, names in (
        (_in_float32, AUTOCAST_WIDE),
        (_summed_in_float32, AUTOCAST_SUMS),
        (_softmax_in_float32, AUTOCAST_SOFTMAX),
    ):
        for name in names:
            packet, _, overload = name.partition(".")
            yield name, partial(policy, getattr(getattr(aten, packet), overload or "default"))


def _in_float32(operation: Callable, *args, **kwargs) -> object:
    with torch.autocast("cpu", enabled=False):
        args, kwargs = tree_map_only(Tensor, lambda given: given.float() if _is_cast(given) else given, (args, kwargs))
        return operation(*args, **kwargs)


def _summed_in_float32(operation: Callable, input: Tensor, *args, dtype: torch.dtype | None = None) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return operation(input, *args, dtype=torch.float32 if dtype is None and _is_cast(input) else dtype)


def _softmax_in_float32(operation: Callable, input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return operation(input, dim, torch.float32 if dtype is None and _is_cast(input) else dtype)


def _is_cast(given: Tensor) -> bool:
    return given.is_floating_point() and given.dtype != torch.float64


# --- inside kernels: each takes an operation, its arguments, and what is to be told of its temporaries


def _with_temporaries(sizes: Callable[..., list[int]], func, args, kwargs, see: See) -> object:
    """Run; then, the results allocated, hold temporaries of so many bytes for a moment."""
    result = func(*args, **kwargs)
    see(result)
    held = [torch.empty(size, dtype=torch.uint8) for size in sizes(*args)]
    see(held)
    return result


def _of_softmax_backward(grad: Tensor, output: Tensor, *_) -> list[int]:
    return [grad.numel() * grad.itemsize]


def _of_embedding_backward(grad: Tensor, indices: Tensor, rows: int, *_) -> list[int]:
    tokens = indices.numel()
    if tokens <= UNSORTED_TOKENS:
        return []
    segments = tokens // 10 + min(tokens, rows)
    return [*[8 * tokens] * 4, 4 * segments * grad.shape[-1]]


def _of_coalesce(coo: Tensor, *_) -> list[int]:
    return [8 * coo._nnz()] * 3


def _of_flash_backward(grad: Tensor, q: Tensor, k: Tensor, *_) -> list[int]:
    batch, heads, queries, head = q.shape
    rounded = -(-queries // 128) * 128
    width = -(-head // 32) * 32 if head <= 128 else -(-head // 64) * 64
    sizes = [4 * batch * heads * rounded, 4 * batch * heads * rounded * width]
    if k.shape[1] != heads:
        sizes += [batch * k.shape[2] * heads * head * k.itemsize] * 2
    return sizes


def _of_efficient_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_) -> list[int]:
    batch, heads, queries, head = q.shape
    rows, columns = (64, 64) if head <= 64 else (128, 64)
    tiles = -(-queries // rows) * -(-head // columns)
    sizes = [4 * batch * heads * queries, 4 * batch * heads * tiles * (4 + rows * columns)]
    if q.dtype == torch.float32:
        sizes.append(4 * batch * heads * queries * v.shape[-1])
    return sizes


def _of_sort(given: Tensor, *_) -> list[int]:
    return [24 * given.numel()] if given.dim() == 1 and given.numel() > MOST_SORTED_IN_A_BLOCK else []


def _largest(card: Card, func, args, kwargs, see: See) -> object:
    """Run; then hold what the thread blocks of a search in ONE long line count: of 256 digits, and what is left."""
    result = func(*args, **kwargs)
    see(result)
    entries = args[0].numel()
    if args[0].dim() != 1 or entries < LEAST_FOR_BLOCKS:
        return result
    a_thread = min(max(-(-entries // (card.multiprocessors * 6 * 256)), 4), 64)
    held = torch.empty(520 * -(-entries // (256 * a_thread)) + 2323, dtype=torch.uint8)
    see(held)
    return result


def _of_eigenvectors(matrix: Tensor, *_) -> list[int]:
    """cuSOLVER's room in CUDA 13.0, by 38 sizes and types on an H100."""
    n = matrix.shape[-1]
    if matrix.dtype == torch.float64:
        return [max(32 * n**2 + 1016 * n + 263_836, 24 * n**2 + 6144 * n + 524_956)]
    if n <= MOST_BY_JACOBI:
        return [4 * n**2 + n**2 // 64 + 132 * n + n // 8 + 4100]
    return [max(16 * n**2 + 508 * n + 131_984, 12 * n**2 + 3072 * n + 262_544)]


def _of_qr(matrix: Tensor, *_) -> list[int]:
    """cuSOLVER's room for the factors of (..., columns) in CUDA 13.0, by six sizes on an H100."""
    columns = matrix.shape[-1]
    return [(max(columns, 256) + 512) * 1024 * matrix.itemsize + columns * matrix.itemsize + 132]


def _of_sparse_product(result: Tensor, sparse: Tensor, *_) -> list[int]:
    """What cuSPARSE's product works on: the result column by column, and the rows of the entries, compressed."""
    if sparse.layout != torch.sparse_coo:
        return []
    entries = sparse._nnz()
    return [result.numel() * result.itemsize, entries * (20 + result.itemsize) + 4 * (sparse.shape[0] + 1)]


def _reduce(card: Card, func, args, kwargs, see: See) -> object:
    """Run; then, the result allocated, hold the buffers of the kernel's thread blocks for a moment."""
    result = func(*args, **kwargs)
    see(result)
    given, dims = args[0], args[REDUCTIONS[func]] if len(args) > REDUCTIONS[func] else None
    dims = range(given.dim()) if dims in (None, [], ()) else [dims] if isinstance(dims, int) else dims
    bytes_each = _accumulator_bytes(func, given.dtype, kwargs.get("dtype"))
    held = [
        torch.empty(size, dtype=torch.uint8)
        for size in partial_results_bytes(
            card, given.shape, given.stride(), {dim % max(given.dim(), 1) for dim in dims}, bytes_each
        )
    ]
    see(held)
    return result


def _accumulator_bytes(func, dtype: torch.dtype, asked: torch.dtype | None) -> int:
    if func in EXTREMES:
        return dtype.itemsize
    wide = asked or dtype
    return 8 if not wide.is_floating_point else max(4, wide.itemsize)


def _layer_norm(func, args, kwargs, see: See) -> object:
    out, *statistics = func(*args, **kwargs)
    if out.dtype in HALVES:
        statistics = [torch.empty_like(each, dtype=torch.float32) for each in statistics]
    return out, *statistics


def _sort(func, args, kwargs, see: See) -> object:
    """Where its input is."""
    if getattr(args[0].untyped_storage(), "on_host", False):
        return _on_host(slice(None), func, args, kwargs, see)
    return _with_temporaries(_of_sort, func, args, kwargs, see)


def _on_host(results: slice, func, args, kwargs, see: See) -> object:
    """Run; those of the results are not on the card."""
    result = func(*args, **kwargs)
    for tensor in (result if isinstance(result, tuple) else (result,))[results]:
        if isinstance(tensor, FakeTensor):
            tensor.untyped_storage().on_host = True
    return result


MOST_SORTED_IN_A_BLOCK = 4096
LEAST_FOR_BLOCKS = 20_000
# Up to here eigenvectors in float32 are found by another method, which takes a quarter of the room.
MOST_BY_JACOBI = 512
EXTREMES = {aten.amax.default, aten.amin.default, aten.max.default, aten.min.default}
# Reductions, and which argument has the dimensions; without one, or with none in it, they are all.
REDUCTIONS = {
    aten.sum.default: 1,
    aten.sum.dim_IntList: 1,
    aten.mean.default: 1,
    aten.mean.dim: 1,
    aten.linalg_vector_norm.default: 2,
    **dict.fromkeys(EXTREMES, 1),
}

MATRIX_PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.addmm_.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.baddbmm_.default,
}


def _cpu_alone(func, args, kwargs, see: See) -> object:
    raise Unmodelled(f"{func} is the CPU's; no card would run it")


_KERNELS = {
    aten._softmax_backward_data.default: partial(_with_temporaries, _of_softmax_backward),
    aten.embedding_dense_backward.default: partial(_with_temporaries, _of_embedding_backward),
    aten._coalesce.default: partial(_with_temporaries, _of_coalesce),
    aten._scaled_dot_product_flash_attention_backward.default: partial(_with_temporaries, _of_flash_backward),
    aten._scaled_dot_product_efficient_attention_backward.default: partial(_with_temporaries, _of_efficient_backward),
    aten._linalg_eigh.default: partial(_with_temporaries, _of_eigenvectors),
    aten._linalg_eigh.eigenvalues: partial(_with_temporaries, _of_eigenvectors),
    aten.linalg_qr.default: partial(_with_temporaries, _of_qr),
    aten.addmm.default: partial(_with_temporaries, _of_sparse_product),
    aten.addmm_.default: partial(_with_temporaries, _of_sparse_product),
    aten.native_layer_norm.default: _layer_norm,
    aten.lift_fresh.default: partial(_on_host, slice(None)),
    # By the host's generator: no method permutes with a card's, which fake tensors could not tell from it.
    aten.randperm.generator: partial(_on_host, slice(None)),
    aten.sort.default: _sort,
    aten.sort.stable: _sort,
    aten._scaled_dot_product_efficient_attention.default: partial(_on_host, slice(2, None)),
    aten._scaled_dot_product_flash_attention_for_cpu.default: _cpu_alone,
}
