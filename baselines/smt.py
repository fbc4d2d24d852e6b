"""Sparse Matrix Tuning: square blocks of the weights train, those with the largest gradient.

He et al., "SMT: Fine-Tuning Large Language Models with Sparse Matrices", ICLR 2025, arXiv 2405.15525. Weights are cut
into blocks of l x l, l = 256; after warm-up steps the n blocks with the largest mean absolute gradient of ALL target
weights train, so that one layer may hold many and another none. A selected block (i, j) has the gradient
`dL/dY[:, rows of i]^T X[:, columns of j]`: of X the columns of selected blocks alone are saved, as a copy, since a view
would keep all of X alive.

What this file does where the paper leaves it open or where it differs:
 - The budget n is the paper's: blocks over all target weights together. So `budget_params` is n l^2 whatever is
   chosen, and it can be matched with a method whose budget is below one block a layer.
 - Blocks are l x l in every target weight, with the largest l up to 256 whose multiples cover at least 15/16 of every
   dimension of theirs: 256 for BERT, RoBERTa and LLaMA, where all is covered, and 192 for 384 x 1536. Rows and columns
   at the end that no block covers never train.
 - The mean is over the block's entries and the warm-up batches. The authors sum the gradients of 100 steps of full
   fine-tuning for it, with a dense sum for each weight. Here the absolute gradients of `calibration_steps` batches are
   averaged at the pretrained weights: one number for each block is kept, and one layer's gradient lives at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.autograd.function import once_differentiable

from baselines.method import Knob, LayerBytes, Method, MethodError, Shape, size, target_shapes
from sparsegrad.adapted import AdaptedLinear, adapted_layers, is_transposed, replace_layers, source_weight
from sparsegrad.autocast import like_linear
from sparsegrad.gradients import stream_gradients
from sparsegrad.products import LiveRows
from sparsegrad.values import check_finite

LARGEST_SIDE = 256
MOST_UNCOVERED = 1 / 16

Block = tuple[int, int]  # block row i, block column j


def block_side(shapes: Sequence[Shape]) -> int:
    """l: the largest number up to `LARGEST_SIDE` that leaves at most `MOST_UNCOVERED` of every dimension over."""
    dimensions = {dimension for shape in shapes for dimension in shape}
    sides = range(min(LARGEST_SIDE, *dimensions), 0, -1)
    return next(side for side in sides if all(d % side <= MOST_UNCOVERED * d for d in dimensions))


def blocks_of(shape: Shape, side: int) -> tuple[int, int]:
    """How many rows and columns of blocks a weight of (D_out, D_in) has."""
    return shape[0] // side, shape[1] // side


@like_linear
class SMTFunction(torch.autograd.Function):
    """`Y = X W^T + b`, where blocks of W train; of X the block columns that they lie in are saved."""

    @staticmethod
    def forward(ctx, x, values, weight, bias, blocks):
        """x (T, D_in), values (n, l, l), weight (D_out, D_in) that holds them -> (T, D_out)."""
        y = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
        kept = None
        if values is not None and ctx.needs_input_grad[1]:
            ctx.dtype, ctx.side = values.dtype, values.shape[1]
            kept = block_columns(x, columns_of(blocks), ctx.side)
        ctx.save_for_backward(kept, weight)
        ctx.blocks = blocks
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """dL/dY (T, D_out) -> dL/dX (T, D_in), dL/dvalues (n, l, l), dL/db (D_out,)."""
        kept, weight = ctx.saved_tensors
        need_x, need_values, _, need_bias, _ = ctx.needs_input_grad
        live = LiveRows(dy)
        dy = live.of(dy)
        dx = dvalues = None
        if need_values:
            kept, side = live.of(kept), ctx.side
            dvalues = torch.empty(len(ctx.blocks), side, side, dtype=ctx.dtype, device=dy.device)
            at = {j: p * side for p, j in enumerate(columns_of(ctx.blocks))}
            for n, (i, j) in enumerate(ctx.blocks):
                dvalues[n] = dy[:, i * side : (i + 1) * side].T @ kept[:, at[j] : at[j] + side]
        dbias = dy.sum(0) if need_bias else None
        del kept
        if need_x:
            dx = live.back(dy @ weight)
        return dx, dvalues, None, dbias, None


def columns_of(blocks: Sequence[Block]) -> list[int]:
    """The block columns that hold a block, rising."""
    return sorted({j for _, j in blocks})


def block_columns(x: Tensor, columns: Sequence[int], side: int) -> Tensor:
    """The named block columns of X (T, D_in) as a copy (T, l for each of them); X itself where it has no others."""
    if len(columns) * side == x.shape[1]:
        return x
    return torch.cat([x[:, j * side : (j + 1) * side] for j in columns], 1)


class SMTLinear(AdaptedLinear):
    """A frozen linear layer of which some blocks train: (..., D_in) -> (..., D_out).

    `values` (n, l, l) are what the optimizer sees; forward writes them into the frozen weight. A layer without a block
    has none.

    Args:
        linear: nn.Linear or Conv1D; the weight's storage is shared.
        blocks: (i, j) of the blocks that train, distinct.
        side: l.
        dtype: dtype of the values; None for the weight's.
    """

    def __init__(self, linear: nn.Module, blocks: Sequence[Block], side: int, dtype: torch.dtype | None = None):
        weight = source_weight(linear)
        super().__init__(weight.shape[1], weight.shape[0], is_transposed(linear))
        self.blocks, self.side = tuple(blocks), side
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", linear.bias)
        self.register_parameter("values", None)
        if blocks:
            values = torch.empty(len(blocks), side, side, dtype=dtype or weight.dtype, device=weight.device)
            for value, block in zip(values, self._views(), strict=True):
                value.copy_(block)
            self.values = nn.Parameter(values)

    def _views(self) -> list[Tensor]:
        """The blocks as views of the weight. Through .data: what is written there changes nothing a forward saved."""
        data, side = self.weight.data, self.side
        return [data[i * side : (i + 1) * side, j * side : (j + 1) * side] for i, j in self.blocks]

    def _write(self) -> None:
        for n, block in enumerate(self._views()):
            block.copy_(self.values.detach()[n])

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        self._write()
        y = SMTFunction.apply(x.reshape(-1, self.in_features), self.values, self.weight, self.bias, self.blocks)
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """The weight with the values written into it."""
        self._write()
        return self.weight.detach()

    def extra_repr(self) -> str:
        """Shape, bias and blocks."""
        return f"{super().extra_repr()}, blocks={len(self.blocks)}, side={self.side}"


class SMT(Method):
    """The n blocks of all target weights with the largest mean absolute gradient, with moments for those alone."""

    name = "smt"
    knob = Knob("blocks over all layers", default=1)

    def prepare(self, model, batches):
        """Measure the blocks' gradients, choose, replace the target layers, set what trains."""
        self.check_model(model)
        shapes = dict(zip(self.target_names(), target_shapes(model, self.setting.layers), strict=True))
        side = block_side(list(shapes.values()))
        chosen = choose_blocks(self._sums(model, batches, shapes, side), self.budget)
        dtype = self.setting.own_dtype

        for name, blocks in chosen.items():
            replace_layers(
                model,
                [name],
                lambda layer, blocks=blocks: SMTLinear(layer, blocks, side, dtype(layer.weight.dtype)),
            )
        layers = [layer for _, layer in adapted_layers(model)]
        own = [layer.values for layer in layers if layer.values is not None]
        self.freeze(model, own, [layer.weight for layer in layers])

    def _sums(self, model: nn.Module, batches, shapes: Mapping[str, Shape], side: int) -> dict[str, Tensor]:
        """Layer name -> the absolute gradients of its blocks (`blocks_of`), summed over entries and batches."""
        sums: dict[str, Tensor] = {}

        def consume(kind: str, name: str, dy: Tensor, x: Tensor) -> None:
            gradient = dy.T @ x
            check_finite(gradient)
            if name not in sums:
                dtype = torch.promote_types(gradient.dtype, torch.float32)
                sums[name] = gradient.new_zeros(blocks_of(shapes[name], side), dtype=dtype)
            covered = gradient[:, : sums[name].shape[1] * side]
            for total, rows in zip(sums[name], covered.split(side), strict=False):
                total += rows.abs().unflatten(1, (-1, side)).sum((0, 2), dtype=total.dtype)

        warm_up = islice(batches, self.setting.calibration_steps)
        stream_gradients(model, self.setting.layers, warm_up, self.setting.backward, consume)
        for name in shapes:
            if name not in sums:
                raise MethodError(f"no gradient of {name!r} arrived to choose blocks by: give at least one batch")
        return {name: sums[name] for name in shapes}

    def budget_params(self, shapes):
        """n l^2: the entries of the blocks, wherever they lie."""
        return self.budget * block_side(shapes) ** 2

    def layer_params(self, shape):
        """n l^2 where the layer is the only target: which layers hold the blocks follows from their gradients."""
        return self.budget_params([shape])

    @classmethod
    def largest_budget(cls, shapes):
        """The blocks of all target weights together."""
        side = block_side(shapes)
        return sum(rows * columns for rows, columns in (blocks_of(shape, side) for shape in shapes))

    def formula(self, shape, tokens, dtype):
        """For the only target layer: W; n blocks with gradient and moments; the columns of X that they lie in.

        `activation` is what it is where no two blocks share their columns; where some do it is less.
        """
        d_out, d_in = shape
        side = block_side([shape])
        own = size(self.layer_params(shape), self.setting.own_dtype(dtype))
        width = min(self.budget, blocks_of(shape, side)[1]) * side
        return LayerBytes(
            parameter=size(d_out * d_in, dtype) + own,
            gradient=own,
            optimizer=2 * own,
            activation=0 if width == d_in else size(tokens * width, dtype),
            keeps_input=width == d_in,
        )


def choose_blocks(scores: Mapping[str, Tensor], count: int) -> dict[str, list[Block]]:
    """Layer name -> its blocks (i, j), row by row, among the `count` of largest score over all layers.

    Args:
        scores: layer name -> the scores of its blocks, rows by columns.
        count: blocks, at most as many as there are.
    """
    sizes = [score.numel() for score in scores.values()]
    found = torch.cat([score.reshape(-1) for score in scores.values()]).topk(count).indices.sort().values
    try:
        taken = set(found.tolist())
    except DataDependentOutputException:
        # Fake: nobody knows which. Each layer gets its share.
        ends = [count * sum(sizes[: n + 1]) // sum(sizes) for n in range(len(sizes))]
        return {
            name: _apart(tuple(score.shape), end - start)
            for (name, score), start, end in zip(scores.items(), [0, *ends], ends, strict=False)
        }
    blocks, first = {}, 0
    for name, score in scores.items():
        width = score.shape[1]
        blocks[name] = [divmod(n, width) for n in range(score.numel()) if first + n in taken]
        first += score.numel()
    return blocks


def _apart(shape: Shape, count: int) -> list[Block]:
    """So many of the blocks of a weight of `shape` blocks, in as many columns as they can lie in."""
    return sorted(divmod(n, shape[1]) for n in range(count))
