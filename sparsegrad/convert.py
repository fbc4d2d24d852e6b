"""Convert a model, save it and load it again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from sparsegrad.adapted import (
    AdaptedLinear,
    adapted_layers,
    check_unconverted,
    is_linear,
    replace_layers,
    weight_shape,
)
from sparsegrad.basis import TransitionMatrices, check_bases
from sparsegrad.core import CoreLinear
from sparsegrad.errors import SparseGradError
from sparsegrad.fixed import FixedLinear
from sparsegrad.folded import FoldedLinear
from sparsegrad.linear import PRODUCTS, SparseGradLinear, check_blocks
from sparsegrad.support import resolve_nnz

FORMAT = "sparsegrad-1"
# The layers that are saved and loaded, by name.
FORMS = {form.__name__: form for form in (SparseGradLinear, FoldedLinear, FixedLinear, CoreLinear)}


def convert(
    model: nn.Module,
    layers: Mapping[str, Sequence[str]],
    bases: Mapping[str, TransitionMatrices],
    *,
    nnz: int | None = None,
    density: float | None = None,
    product: str = "sparse-by-dense",
    blocks: int = 1,
) -> nn.Module:
    """Replace the named linear layers by `SparseGradLinear`, in place; returns the model.

    Args:
        model: the model, unconverted.
        layers: kind -> layer names, from `find_layers`.
        bases: kind -> transition matrices, from `calibrate`.
        nnz: entries kept per layer and step; or
        density: their share of each layer's weight, in (0, 1].
        product, blocks: see `SparseGradLinear`.

    Raises:
        SparseGradError: before anything is changed, for whatever does not fit.
    """
    check_unconverted(model)
    shapes = check_bases(model, layers, bases)
    if product not in PRODUCTS:
        raise SparseGradError(f"product must be one of {', '.join(PRODUCTS)}, got {product!r}")
    check_blocks(blocks)
    for shape in shapes.values():
        resolve_nnz(shape, nnz=nnz, density=density)
    for kind, names in layers.items():
        basis = bases[kind]
        replace_layers(
            model,
            names,
            lambda layer, basis=basis: SparseGradLinear.in_basis(
                layer, basis, nnz=nnz, density=density, product=product, blocks=blocks
            ),
        )
    return model


def save(model: nn.Module, path: str | os.PathLike, optimizers: Sequence[Optimizer] = ()) -> None:
    """Write a converted model to one safetensors file: every parameter and buffer, each once, U and V too.

    With `optimizers`, their state goes along, so that training continues with the very step that would have come next.
    """
    sparse = {name: layer for name, layer in adapted_layers(model) if type(layer) in FORMS.values()}
    if not sparse:
        raise SparseGradError(f"{type(model).__name__} holds no SparseGrad layer to save; convert it first")
    state = model.state_dict()
    aliases = _aliases(state)
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in state.items() if name not in aliases}
    groups = []
    for i, optimizer in enumerate(optimizers):
        optimizer_state = optimizer.state_dict()
        groups.append(optimizer_state["param_groups"])
        for index, entries in optimizer_state["state"].items():
            for entry, value in entries.items():
                tensors[f"optimizer.{i}.{index}.{entry}"] = torch.as_tensor(value).contiguous()
    owners: dict[TransitionMatrices, str] = {}  # the first layer that has them
    description = {
        "layers": {
            name: {"form": type(layer).__name__, "basis": owners.setdefault(layer.basis, name), **layer.facts()}
            for name, layer in sparse.items()
        },
        "aliases": aliases,
        "optimizers": groups,
    }
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, temporary, metadata={"format": FORMAT, "description": json.dumps(description)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise SparseGradError(f"cannot write {path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def load(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Convert an unconverted model of the same architecture to what `save` wrote, in place; returns it.

    As `load_state_dict` does, it casts to the model's dtypes and device, and leaves `requires_grad` and the mode alone.

    Raises:
        SparseGradError: the file is not one of `save`'s, or does not fit the model; the model is as it was.
    """
    check_unconverted(model)
    description, tensors = _read(path, "model.")
    layers = description["layers"]
    modules = dict(model.named_modules())
    state = model.state_dict()
    expected = {name: tuple(value.shape) for name, value in state.items()}
    stored = {**tensors, **{alias: tensors.get(first) for alias, first in description["aliases"].items()}}
    own: dict[str, dict[str, Tensor]] = {}
    for name, facts in layers.items():
        if name not in modules or not is_linear(modules[name]):
            raise SparseGradError(f"{path} holds a SparseGrad layer {name!r}, which is no linear layer of this model")
        if facts["form"] not in FORMS:
            raise SparseGradError(
                f"{path} holds a {facts['form']!r} as layer {name!r}; this version knows: {', '.join(FORMS)}"
            )
        prefix = f"{name}."
        own[name] = {
            key.removeprefix(prefix): value
            for key, value in stored.items()
            if key.startswith(prefix) and value is not None
        }
        shapes = FORMS[facts["form"]].state_shapes(weight_shape(modules[name]), own[name])
        expected.update({prefix + key: shape for key, shape in shapes.items()})
    for name in sorted(expected.keys() | stored.keys()):
        found = tuple(stored[name].shape) if stored.get(name) is not None else None
        if found != expected.get(name):
            raise SparseGradError(
                f"{path} does not fit this model: {name!r} is {found or 'missing'} in the file "
                f"and {expected.get(name) or 'missing'} in the model"
            )
    tied, tied_here = {n: first for n, first in description["aliases"].items() if n in state}, _aliases(state)
    if tied != tied_here:
        name = min(tied.items() ^ tied_here.items())[0]
        raise SparseGradError(f"{path} does not fit this model: {name!r} is tied in one of them and not in the other")

    bases: dict[str, TransitionMatrices] = {}

    def build(name: str, layer: nn.Module) -> AdaptedLinear:
        facts, matrices = layers[name], [own[name].get(f"basis.{matrix}") for matrix in "UV"]
        # Copied: what was read from the file is not aligned as torch's own memory is, and products round differently.
        here = [None if matrix is None else matrix.to(layer.weight, copy=True) for matrix in matrices]
        basis = bases.setdefault(facts["basis"], TransitionMatrices(*here))
        return FORMS[facts["form"]].restored(layer, basis, facts, own[name])

    for name in layers:
        replace_layers(model, [name], lambda layer, name=name: build(name, layer))
    model.load_state_dict(stored)
    return model


def load_optimizers(optimizers: Sequence[Optimizer], path: str | os.PathLike) -> None:
    """Give optimizers, built over a loaded model as the saved ones were over theirs, the state that `save` wrote."""
    description, tensors = _read(path, "optimizer.")
    groups = description["optimizers"]
    if len(groups) != len(optimizers):
        raise SparseGradError(f"{path} holds the state of {len(groups)} optimizers, got {len(optimizers)} to fill")
    for i, (optimizer, saved) in enumerate(zip(optimizers, groups, strict=True)):
        sizes = [[len(group["params"]) for group in side] for side in (saved, optimizer.param_groups)]
        if sizes[0] != sizes[1]:
            raise SparseGradError(
                f"{path} does not fit optimizer {i}: groups of {sizes[0]} parameters in the file, {sizes[1]} here"
            )
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            which, index, entry = key.split(".", 2)
            if int(which) == i:
                state.setdefault(int(index), {})[entry] = value
        optimizer.load_state_dict({"state": state, "param_groups": groups[i]})


def _aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> first name of the same tensor, for every entry that is not the first."""
    aliases: dict[str, str] = {}
    firsts: dict[tuple, str] = {}
    for name, tensor in state.items():
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        first = firsts.setdefault(key, name)
        if first != name:
            aliases[name] = first
    return aliases


def _read(path: str | os.PathLike, prefix: str) -> tuple[dict, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise SparseGradError(f"{path} was not written by sparsegrad.save (format {metadata.get('format')!r})")
            tensors = {key[len(prefix) :]: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}
    except (OSError, SafetensorError) as error:
        raise SparseGradError(f"cannot read {path}: {error}") from None
    return json.loads(metadata["description"]), tensors
