"""SparseGrad with a fixed support: which entries of W~ train is chosen once, from the energy of its gradients.

>>> layers = find_layers(model)
>>> ranks = {kind: fixed_ranks(shape, nnz=1000) for kind, shape in checked_shapes(model, layers).items()}
>>> bases = calibrate(model, layers, batches, ranks=ranks)
>>> chosen = choose_entries(model, layers, bases, more_batches, nnz=1000)
>>> convert_fixed(model, layers, bases, chosen)

The gradient of a layer is a dense vector of the chosen entries alone, and so are the optimizer's moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsegrad.adapted import (
    AdaptedLinear,
    check_unconverted,
    is_linear,
    is_transposed,
    replace_layers,
    source_weight,
    weight_shape,
)
from sparsegrad.autocast import cast_to, like_linear
from sparsegrad.basis import Ranks, TransitionMatrices
from sparsegrad.errors import SparseGradError
from sparsegrad.gradients import default_backward, stream_gradients
from sparsegrad.linear import into_basis
from sparsegrad.mlp import checked_shapes
from sparsegrad.products import BLOCK_FRACTION, LiveRows, Selection
from sparsegrad.support import position_dtype, resolve_nnz
from sparsegrad.values import check_finite, passes

# The choice of k entries remembers CANDIDATES * k. Over ten steps of a BERT encoder the worst layer's entries hold 83,
# 99.0 and 99.5 % of the held-out energy that the choice by a dense sum has, with 2, 4 and 8 at k = 0.1 % of its weight,
# and 99.4, 99.9 and 99.9 % at k = 1 % or more.
CANDIDATES = 4
# Where X is rotated, entries are chosen in an eighth of its directions, the leading ones, or in as many as make the
# entries a quarter of what they are chosen from. In a BERT encoder that costs less than 1 % of the held-out energy.
LEADING_FRACTION = 8
LARGEST_SHARE = 4

SIDES = ("smaller", "both")


def fixed_ranks(
    shape: tuple[int, int], *, nnz: int | None = None, density: float | None = None, sides: str = "smaller"
) -> Ranks:
    """How many directions of each side of a weight of (D_out, D_in) a fixed support of `nnz` entries takes.

    Those of the output are all or none. Of the input's, ordered by the energy of the gradients, few hold nearly all of
    it: an eighth, or as many as make `nnz` a quarter of the entries that they offer. `sides` says which are rotated:
    `smaller`, the side with fewer dimensions alone (the input's where they are equal); or `both`, as in the paper.
    """
    if sides not in SIDES:
        raise SparseGradError(f"sides must be one of {', '.join(SIDES)}, got {sides!r}")
    d_out, d_in = shape
    count = resolve_nnz(shape, nnz=nnz, density=density)
    leading = min(d_in, max(-(-d_in // LEADING_FRACTION), -(-LARGEST_SHARE * count // d_out)))
    if sides == "both":
        return Ranks(d_out, leading)
    return Ranks(0, leading) if d_in <= d_out else Ranks(d_out, 0)


def columns(basis: TransitionMatrices, d_in: int) -> int:
    """How many columns of W~ entries can train in: those of the directions that U has; all where X is not rotated."""
    return d_in if basis.U is None else basis.U.shape[0]


@like_linear
class FixedFunction(torch.autograd.Function):
    """`Y = (X W^T + X U^T D^T) V + b`, where k entries of D train; U or V may be None.

    Without U these are entries of W itself, and D is not there. The gradient of the values is the matching entries of
    `(dL/dY V^T)^T X U^T`; of X no more than `X U^T` is kept. Tokens whose dL/dY is zero take no part in backward.
    """

    @staticmethod
    def forward(ctx, x, values, weight, bias, U, V, index, selection):
        """x (T, D_in), values (k,) at index (k,), weight V W (D_out, D_in) -> (T, D_out)."""
        y = x @ weight.T if bias is None or V is not None else torch.addmm(bias, x, weight.T)
        kept = x
        if U is not None:
            kept = x @ U.to(x.dtype).T
            y.addmm_(kept, scattered(values, index, weight, U).T)
        if V is not None:
            y = y @ V.to(x.dtype) if bias is None else torch.addmm(bias, y, V.to(x.dtype))
        ctx.save_for_backward(kept, values, weight, U, V, index)
        ctx.selection = selection
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """dL/dY (T, D_out) -> dL/dX (T, D_in), dL/dvalues (k,), dL/db (D_out,)."""
        kept, values, weight, U, V, index = ctx.saved_tensors
        need_x, need_values, _, need_bias = ctx.needs_input_grad[:4]
        live = LiveRows(dy)
        dy = live.of(dy)
        # No copies, except under autocast.
        U, V = cast_to(U, dy.dtype), cast_to(V, dy.dtype)
        dx = dvalues = None
        # The values first: the blocks of their gradient are gone before dL/dX exists.
        if need_values:
            kept = live.of(kept)
            dvalues = ctx.selection.select(dy, kept, index, V).to(values.dtype)
        dbias = dy.sum(0) if need_bias else None
        del kept
        if need_x:
            D = None if U is None else scattered(values, index, weight, U)
            dx = live.back(input_gradient(dy, weight, D, U, V))
        return dx, dvalues, None, dbias, None, None, None, None


def scattered(values: Tensor, index: Tensor, weight: Tensor, U: Tensor) -> Tensor:
    """D (D_out, k_in) in the weight's dtype: the values at their positions, zeros elsewhere."""
    D = weight.new_zeros(weight.shape[0], U.shape[0])
    return D.put_(index.long(), values.detach().to(D.dtype))


def input_gradient(dy: Tensor, weight: Tensor, D: Tensor | None, U: Tensor | None, V: Tensor | None) -> Tensor:
    """`dL/dY V^T (W + D U)` (T, D_in); `dL/dY V^T` never exists for more than a block of tokens."""
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    tokens = max(1, dy.shape[0] if V is None else -(-dy.shape[0] // BLOCK_FRACTION))
    for part, out in zip(dy.split(tokens), dx.split(tokens), strict=True):
        left = part if V is None else part @ V.T
        torch.mm(left, weight, out=out)
        if U is not None:
            out.addmm_(left @ D, U)
    return dx


class FixedLinear(AdaptedLinear):
    """A linear layer of which only entries of W~ at fixed positions train: (..., D_in) -> (..., D_out).

    With `W~ = V W U^T` a change D of its leading k_in columns is the change `V^T D U` of W, where U (k_in, D_in) has
    the leading directions alone: `Y = (X (V W)^T + X U^T D^T) V + b`. So the other columns of W~ need no basis, and X
    is not rotated in full. `values` (k,) are what the optimizer sees, moments and all: the entries of D, zero at first;
    where X is not rotated, the entries of V W themselves, which forward writes into the frozen weight.

    Args:
        weight: V W (D_out, D_in), contiguous; written to where X is not rotated.
        bias: (D_out,) or None.
        basis: U (k_in, D_in) and V (D_out, D_out), shared by the layers of a kind; a side may be None, the identity.
        index: which train: rising flat positions `row * k_in + col` (D_in where U is None), int32 or int64, (k,).
        dtype: dtype of the values; None for the weight's. A wider one keeps updates that the weight would round away.

    Raises `SparseGradError` for matrices or positions that do not fit.
    """

    index: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: nn.Parameter | None,
        basis: TransitionMatrices,
        index: Tensor,
        dtype: torch.dtype | None = None,
        transposed: bool = False,
    ):
        super().__init__(weight.shape[1], weight.shape[0], transposed)
        check_fixed(basis, index, (self.out_features, self.in_features), weight)
        self.basis = basis
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", bias)
        self.register_buffer("index", index)
        if basis.U is None:
            values = torch.take(weight, index.long()).to(dtype or weight.dtype)
        else:
            values = weight.new_zeros(index.numel(), dtype=dtype or weight.dtype)
        self.values = nn.Parameter(values)
        block_rows = max(1, -(-self.out_features // BLOCK_FRACTION))
        self.selection = Selection(index, (self.out_features, columns(basis, self.in_features)), block_rows)

    @classmethod
    @torch.no_grad()
    def in_basis(
        cls, linear: nn.Module, basis: TransitionMatrices, index: Tensor, dtype: torch.dtype | None = None
    ) -> FixedLinear:
        """The layer that computes what `linear` (nn.Linear or Conv1D) does; shares its bias.

        Without V it shares the weight too, as far as that is stored as (D_out, D_in).
        """
        if not is_linear(linear):
            raise SparseGradError(f"only a plain linear layer can be converted, got a {type(linear).__name__}")
        check_fixed(basis, index, weight_shape(linear), linear.weight)
        weight = source_weight(linear)
        weight = weight.contiguous() if basis.V is None else into_basis(weight, TransitionMatrices(None, basis.V))
        return cls(weight, linear.bias, basis, index, dtype, is_transposed(linear))

    def facts(self) -> dict[str, object]:
        """What rebuilds the layer, beside its tensors: nothing."""
        return {}

    @classmethod
    def state_shapes(cls, shape: tuple[int, int], stored: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """The shapes that the entries of a state must have for a weight of (D_out, D_in)."""
        d_out, d_in = shape
        count = (stored["index"].numel(),) if "index" in stored else (d_out * d_in,)
        U = {"basis.U": (len(stored["basis.U"]), d_in)} if "basis.U" in stored else {}
        V = {"basis.V": (d_out, d_out)} if "basis.V" in stored else {}
        return {"weight": shape, "values": count, "index": count, **U, **V}

    @classmethod
    def restored(
        cls, linear: nn.Module, basis: TransitionMatrices, facts: Mapping[str, object], stored: Mapping[str, Tensor]
    ) -> FixedLinear:
        """The layer in place of `linear`, its weight and positions from what is stored; its values are to be loaded.

        Values that were stored in a wider dtype than the weight keep it; others take that of `linear`'s weight.
        """
        weight = stored["weight"].to(linear.weight, copy=True)
        index = stored["index"].to(linear.weight.device, copy=True)
        values = stored["values"].dtype
        wider = None if values == stored["weight"].dtype else values
        return cls(weight, linear.bias, basis, index, wider, is_transposed(linear))

    def _write(self) -> None:
        if self.basis.U is None:
            # Through .data: writing the same values again must not invalidate the weight that a forward saved.
            self.weight.data.put_(self.index.long(), self.values.detach().to(self.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        self._write()
        rows = x.reshape(-1, self.in_features)
        U, V = self.basis.U, self.basis.V
        y = FixedFunction.apply(rows, self.values, self.weight, self.bias, U, V, self.index, self.selection)
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """`W + V^T D U` (D_out, D_in), rounded once; without a basis the layer's own weight."""
        self._write()
        weight, U, V = self.weight.detach(), self.basis.U, self.basis.V
        if U is None and V is None:
            return weight
        whole = weight.double()
        if U is not None:
            whole = whole.addmm(scattered(self.values, self.index, whole, U), U.double())
        if V is not None:
            whole = V.T.double() @ whole
        return whole.to(weight.dtype)

    def extra_repr(self) -> str:
        """Shape, bias and budget."""
        return f"{super().extra_repr()}, nnz={self.values.numel()}"


def check_fixed(basis: TransitionMatrices, index: Tensor, shape: tuple[int, int], weight: Tensor) -> None:
    """Raise `SparseGradError` unless the bases and the positions fit a weight of (D_out, D_in), and V is whole."""
    d_out, d_in = shape
    basis.check_fits(d_out, d_in, weight)
    TransitionMatrices(None, basis.V).check_complete()
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64) or index.numel() == 0:
        raise SparseGradError(
            f"positions must be a vector of at least one int32 or int64, got {index.dtype} of {tuple(index.shape)}"
        )
    width = columns(basis, d_in)
    if not passes((index.diff() > 0).all() & (index[0] >= 0) & (index[-1] < d_out * width)):
        raise SparseGradError(
            f"positions must be rising and from 0 to {d_out * width - 1} where entries of {d_out} x {width} can train"
        )


class EntryStore:
    """The entries of largest accumulated energy of a stack of gradients in a basis, G~ = V G U^T, without a dense sum.

    It remembers a fixed number of candidates, `CANDIDATES * nnz` or as many as there are. A gradient adds its squares
    to theirs; then the candidates are the largest of the old ones and of the gradient's other entries. What is
    approximate: an entry that becomes a candidate brings the energy of that gradient alone, what it had before is
    forgotten. With one gradient, or where every entry is a candidate, the choice is exact.

    Args:
        basis: U (k_in, D_in) and V; a side may be None.
        shape: (D_out, D_in) of the gradients.
        nnz: entries to choose, at most as many as G~ has.
        dtype: of the gradients; energies are summed in at least float32.
    """

    def __init__(
        self,
        basis: TransitionMatrices,
        shape: tuple[int, int],
        nnz: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.basis, self.nnz = basis, nnz
        count = min(CANDIDATES * nnz, shape[0] * columns(basis, shape[1]))
        if nnz > count:
            raise SparseGradError(
                f"{nnz} entries cannot be chosen of {count}: U needs more directions, as fixed_ranks has them"
            )
        # Any distinct positions to begin with: every later size is then the same, whatever the gradients are.
        self.index = torch.arange(count, dtype=position_dtype(shape[0] * shape[1]), device=device)
        self.energy = torch.zeros(count, dtype=torch.promote_types(dtype, torch.float32), device=device)

    def update(self, dy: Tensor, x: Tensor) -> None:
        """Add one gradient G = dY^T X, given dY (T, D_out) and X (T, D_in); of `V G U^T` a block of rows exists.

        Raises `SparseGradError` for a NaN or an infinity, and adds nothing.
        """
        U, V = self.basis.U, self.basis.V
        x = x if U is None else x @ U.T
        height, width = -(-dy.shape[1] // BLOCK_FRACTION), x.shape[1]
        count, dtype = self.energy.numel(), self.energy.dtype
        energy, new, where = self.energy, self.energy[:0], self.index[:0]
        for top in range(0, dy.shape[1], height):
            part = dy[:, top : top + height] if V is None else dy @ V[top : top + height].T
            first, size = top * width, part.shape[1] * width
            # One place more than there are entries, a zero for the candidates that lie in other blocks.
            block = part.new_zeros(size + 1)
            torch.mm(part.T, x, out=block[:size].view(-1, width))
            del part
            check_finite(block)
            known = self.index.long().sub_(first)
            known.masked_fill_((known < 0) | (known >= size), size)
            energy = torch.take(block, known).to(dtype).square_().add_(energy)
            # Counted: the largest of the others are sought, and a negative number comes after all of them.
            block.abs_().put_(known, block.new_full((), -1).expand(known.shape))
            del known
            magnitudes, places = block[:size].topk(min(count, size), sorted=False)
            del block
            magnitudes = magnitudes.to(dtype)
            new, kept = _largest(torch.cat((new, magnitudes.mul_(magnitudes.abs()))), count)
            where = torch.cat((where, places.add_(first).to(where.dtype)))[kept]
            del magnitudes, places, kept
        self.energy, kept = _largest(torch.cat((energy, new)), count)
        self.index = torch.cat((self.index, where))[kept]

    def chosen(self) -> Tensor:
        """The rising flat positions in G~ (D_out, k_in) of the `nnz` candidates of largest energy, (k,)."""
        return self.index[self.energy.topk(self.nnz, sorted=False).indices].sort().values


def _largest(energy: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest, or as many as there are, and where they stand."""
    return energy.topk(min(count, energy.numel()), sorted=False)


def choose_entries(
    model: nn.Module,
    layers: Mapping[str, Sequence[str]],
    bases: Mapping[str, TransitionMatrices],
    batches: Iterable[object],
    backward: Callable[[nn.Module, object], None] = default_backward,
    *,
    nnz: int | None = None,
    density: float | None = None,
) -> dict[str, Tensor]:
    """Layer name -> positions of the entries with the largest gradient energy over the batches, for `FixedLinear`.

    The model is left as it was. `EntryStore` says how far the choice is exact; it is made among the directions that the
    bases have. Beyond a backward pass this holds the candidates of all layers, and of one layer at a time an eighth of
    its gradient in the basis.

    Args:
        model: the model, unconverted.
        layers: kind -> layer names, from `find_layers`.
        bases: kind -> transition matrices, from `calibrate` with the ranks of `fixed_ranks`.
        batches: what `backward` takes, one per step; consumed one at a time.
        backward: runs forward and backward once.
        nnz: entries of each layer; or
        density: their share of each layer's weight, in (0, 1].

    Raises:
        SparseGradError: something does not fit, there is no batch, or a gradient is not finite.
    """
    stores: dict[str, EntryStore] = {}
    for kind, shape in checked_shapes(model, layers).items():
        count = resolve_nnz(shape, nnz=nnz, density=density)
        for name in layers[kind]:
            weight = model.get_submodule(name).weight
            bases[kind].check_fits(*shape, weight)
            stores[name] = EntryStore(bases[kind], shape, count, weight.dtype, weight.device)
    seen = set()

    def consume(kind: str, name: str, dy: Tensor, x: Tensor) -> None:
        stores[name].update(dy, x)
        seen.add(name)

    stream_gradients(model, layers, batches, backward, consume)
    for name in stores:
        if name not in seen:
            raise SparseGradError(f"no gradient of {name!r} arrived to choose its entries by: give at least one batch")
    return {name: stores.pop(name).chosen() for name in list(stores)}


def convert_fixed(
    model: nn.Module,
    layers: Mapping[str, Sequence[str]],
    bases: Mapping[str, TransitionMatrices],
    chosen: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Replace the named linear layers by `FixedLinear`, in place; returns the model.

    Args:
        model: the model, unconverted.
        layers: kind -> layer names, from `find_layers`.
        bases: kind -> transition matrices, from `calibrate`.
        chosen: layer name -> positions, from `choose_entries`.
        dtype: dtype of the trained values; None for the weights'.

    Raises:
        SparseGradError: before anything is changed, for whatever does not fit.
    """
    check_unconverted(model)
    for kind, shape in checked_shapes(model, layers).items():
        if kind not in bases:
            raise SparseGradError(
                f"no transition matrices are given for kind {kind!r}; there are some for: {', '.join(bases)}"
            )
        for name in layers[kind]:
            if name not in chosen:
                raise SparseGradError(f"no entries are given for layer {name!r}; choose them with choose_entries")
            check_fixed(bases[kind], chosen[name], shape, model.get_submodule(name).weight)
    for kind, names in layers.items():
        for name in names:
            replace_layers(
                model,
                [name],
                lambda layer, kind=kind, name=name: FixedLinear.in_basis(layer, bases[kind], chosen[name], dtype),
            )
    return model
