"""DoRA (Liu et al., ICML 2024, arXiv 2402.09353): `diag(m / ||V||) V` with `V = W + s B A`, of which m, A, B train.

||V|| (D_out,) holds the norm of each row of V: the weights of one output, which are a column in the paper's layout. It
is a constant to the gradient (the paper's section 4.3).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from baselines.lora import LoRA, LoRALinear
from baselines.method import LayerBytes, size
from sparsegrad.adapted import adapted_layers
from sparsegrad.autocast import like_linear, without_autocast
from sparsegrad.products import BLOCK_FRACTION, LiveRows


@like_linear
class DoRAFunction(torch.autograd.Function):
    """`Y = (X W^T + s X A^T B^T) diag(g) + b` with `g = m / ||V||` (D_out,).

    dL/dm needs the product before g. It is had from Y, `(Y - b) / m`, which the activation behind a layer keeps anyway:
    a (T, D_out) tensor of its own would be one more, and to multiply again half as long a step again. In turn Y must
    not be changed in place, and an entry of m that is exactly zero rests.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, m, norm, scaling):
        """x (T, D_in), weight (D_out, D_in), A (r, D_in), B (D_out, r), m and norm (D_out,) -> (T, D_out)."""
        gain = (m / norm).to(x.dtype)
        low = x @ A.to(x.dtype).T
        y = (x @ weight.T).addmm_(low, B.to(x.dtype).T, alpha=scaling).mul_(gain)
        if bias is not None:
            y += bias
        ctx.save_for_backward(x, weight, bias, A, B, m, gain, low, y)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """dL/dY (T, D_out) -> dL/dX (T, D_in), dL/db (D_out,), dL/dA (r, D_in), dL/dB (D_out, r), dL/dm (D_out,)."""
        x, weight, bias, A, B, m, gain, low, y = ctx.saved_tensors
        live = LiveRows(dy)
        x, low, y, dy = live.of(x), live.of(low), live.of(y), live.of(dy)
        need_x, _, need_bias, need_a, need_b, need_m, *_ = ctx.needs_input_grad
        dx = dbias = da = db = dm = None
        if need_bias:
            dbias = dy.sum(0)
        if need_m:
            along = _dot_columns(dy, y)
            if bias is not None:
                along -= bias * (dbias if need_bias else dy.sum(0))
            dm = torch.where(m == 0, 0, along / m).to(m.dtype)
        steep = (gain * ctx.scaling).unsqueeze(1)
        if need_b:
            db = (dy.T @ low).mul_(steep).to(B.dtype)
        if need_x or need_a:
            dlow = dy @ (B.to(dy.dtype) * steep)
        if need_a:
            da = (dlow.T @ x).to(A.dtype)
        if need_x:
            del x, low, y
            dx = dy.new_empty(dy.shape[0], weight.shape[1])
            for rows in _blocks(dy.shape[0]):
                torch.mm(dy[rows] * gain, weight, out=dx[rows])
            dx = live.back(dx.addmm_(dlow, A.to(dy.dtype)))
        return dx, None, dbias, da, db, dm, None, None


def _blocks(count: int) -> list[slice]:
    """An eighth of the lines at a time: nothing else of the size of dL/dY is made."""
    step = max(1, -(-count // BLOCK_FRACTION))
    return [slice(start, start + step) for start in range(0, count, step)]


def _dot_columns(a: Tensor, b: Tensor) -> Tensor:
    """`sum_t a_t * b_t` of (T, D) and (T, D), in at least float32: (D,)."""
    total = a.new_zeros(a.shape[1], dtype=torch.promote_types(a.dtype, torch.float32))
    for rows in _blocks(a.shape[0]):
        total += (a[rows] * b[rows]).sum(0)
    return total


class DoRALinear(LoRALinear):
    """`Y = X (diag(m / ||V||) V)^T + b` with `V = W + (alpha / r) B A`: (..., D_in) -> (..., D_out).

    A and B begin as LoRA's and m as the norms of W's rows, so that nothing changes at first. A row of zeros has no
    direction: it stays one.
    """

    squares: Tensor

    def __init__(self, linear: nn.Module, rank: int, alpha: float, dtype: torch.dtype | None = None):
        super().__init__(linear, rank, alpha, dtype)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        squares = self.weight.new_empty(self.out_features, dtype=wide)
        for rows in _blocks(self.out_features):
            squares[rows] = self.weight.detach()[rows].to(wide).square().sum(1)
        self.register_buffer("squares", squares)
        self.m = nn.Parameter(squares.sqrt().to(self.lora_A.dtype))

    @torch.no_grad()
    def norm(self) -> Tensor:
        """||V|| (D_out,), in m's dtype, of which nothing of V's size is made.

        `||v||^2 = ||w||^2 + 2 s (W A^T) b + s^2 b^T (A A^T) b` for each row, where W A^T (D_out, r) is the only product
        with W.
        """
        wide = self.squares.dtype
        # Autocast would round what the norm must not lose: the small difference that an update makes.
        with without_autocast(self.weight.device):
            A, B = self.lora_A.to(self.weight.dtype), self.lora_B.to(wide).mul(self.scaling)
            inner = (self.weight @ A.T).to(wide).mul_(2)
            A = A.to(wide)
            inner += B @ (A @ A.T)
            squares = self.squares + inner.mul_(B).sum(1)
        # Rounded as m was: their quotient is exactly 1 at first. Of a row of zeros it is 0, and not 0 / 0.
        return squares.clamp_min_(0).sqrt_().to(self.m.dtype).clamp_min_(torch.finfo(self.m.dtype).tiny)

    def of_rows(self, x: Tensor) -> Tensor:
        """(T, D_in) -> (T, D_out)."""
        return DoRAFunction.apply(
            x, self.weight, self.bias, self.lora_A, self.lora_B, self.m, self.norm(), self.scaling
        )

    def own(self) -> tuple[nn.Parameter, ...]:
        """A, B and m."""
        return self.lora_A, self.lora_B, self.m

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """`diag(m / ||V||) V` (D_out, D_in)."""
        return super().effective_weight().mul_((self.m / self.norm()).to(self.weight.dtype).unsqueeze(1))


class DoRA(LoRA):
    """DoRA on the target layers; A, B and their scaling begin as those of `lora`."""

    name = "dora"
    layer_class = DoRALinear

    def basis_tensors(self, model):
        """The squared norms of each weight's rows."""
        return (layer.squares for _, layer in adapted_layers(model))

    def layer_params(self, shape):
        """r (D_in + D_out) + D_out."""
        return super().layer_params(shape) + shape[0]

    def formula(self, shape, tokens, dtype):
        """W; A, B and m with gradient and moments; ||W||^2; beside X are saved X A^T (T, r), Y (T, D_out) and g."""
        own = size(self.layer_params(shape), self.setting.own_dtype(dtype))
        return LayerBytes(
            parameter=size(shape[0] * shape[1], dtype) + own,
            gradient=own,
            optimizer=2 * own,
            activation=size(tokens * (self.budget + shape[0]) + shape[0], dtype),
            basis=size(shape[0], torch.promote_types(dtype, torch.float32)),
        )
