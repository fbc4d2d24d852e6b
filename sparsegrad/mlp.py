"""Finds the linear layers that a method acts on, by architecture family.

A family says, for each KIND of layer (layers of one kind share their transition matrices), how its module's name ends.
A new family is one entry here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from torch import nn

from sparsegrad.adapted import check_unconverted, is_linear, weight_shape
from sparsegrad.errors import SparseGradError


class Family(NamedTuple):
    """Kind -> regular expression that the end of a module's name matches."""

    mlp: Mapping[str, str]
    attention: Mapping[str, str]


_BERT = Family(
    mlp={"up": r"intermediate\.dense", "down": r"(?<!attention\.)output\.dense"},
    attention={
        "query": r"attention\.self\.query",
        "key": r"attention\.self\.key",
        "value": r"attention\.self\.value",
        "out": r"attention\.output\.dense",
    },
)
_GPT2 = Family(
    mlp={"up": r"mlp\.c_fc", "down": r"mlp\.c_proj"},
    attention={"qkv": r"attn\.c_attn", "out": r"attn\.c_proj"},
)
_LLAMA = Family(
    mlp={"gate": r"mlp\.gate_proj", "up": r"mlp\.up_proj", "down": r"mlp\.down_proj"},
    attention={
        "query": r"self_attn\.q_proj",
        "key": r"self_attn\.k_proj",
        "value": r"self_attn\.v_proj",
        "out": r"self_attn\.o_proj",
    },
)

# model_type of a transformers config -> family
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "bert": _BERT,
        "roberta": _BERT,
        "xlm-roberta": _BERT,
        "gpt2": _GPT2,
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "qwen2": _LLAMA,
        "qwen3": _LLAMA,
        "gemma": _LLAMA,
        "gemma2": _LLAMA,
    }
)

# A head is never a target of `all-linear`.
_HEADS = re.compile(r"(^|\.)(classifier|score|lm_head|qa_outputs)(\.|$)")


def find_layers(model: nn.Module, targets: str | Mapping[str, str] = "mlp") -> dict[str, list[str]]:
    """Kind -> names of the linear layers of that kind, in the model's order.

    Args:
        model: a transformers model of a known family, or any model where `targets` names layers.
        targets: `mlp`, `attention` (the family's), either with `/N` for those of every N-th block from the first on
            (`mlp/3`), `all-linear` (every linear layer outside the heads), names as the comma-separated ends of module
            names (each name is a kind), or a mapping kind -> regular expression.

    Raises:
        SparseGradError: the family is unknown, or nothing matches (it says how to name the layers), or a layer matches
            two targets, or layers of the model were replaced already.
    """
    check_unconverted(model)
    every = 1
    if isinstance(targets, str) and (named := re.fullmatch(r"(mlp|attention)(?:/([1-9]\d{0,5}))?", targets)):
        patterns = getattr(_family(model), named[1])
        every = int(named[2] or 1)
    elif targets == "all-linear":
        return _all_linear(model)
    elif isinstance(targets, str):
        names = [name.strip() for name in targets.split(",") if name.strip()]
        patterns = {name: re.escape(name) for name in names}
    else:
        patterns = dict(targets)

    found = {kind: _matching(model, pattern)[::every] for kind, pattern in patterns.items()}
    empty = [kind for kind, names in found.items() if not names]
    if empty or not found:
        raise SparseGradError(
            f"no linear layer of {type(model).__name__} matches target {', '.join(empty) or repr(targets)}; "
            f"its linear layers end in: {_endings(model)}"
        )
    kind_of: dict[str, str] = {}
    for kind, names in found.items():
        for name in names:
            if kind_of.setdefault(name, kind) != kind:
                raise SparseGradError(f"{name!r} matches two targets, {kind_of[name]!r} and {kind!r}; tell them apart")
    return found


def _family(model: nn.Module) -> Family:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    family = FAMILIES.get(model_type)
    if family is None:
        raise SparseGradError(
            f"no family is known for {type(model).__name__} (model_type {model_type!r}; known: {', '.join(FAMILIES)}); "
            f"name its layers with targets, for example targets={{'up': 'ffn.fc1', 'down': 'ffn.fc2'}}; "
            f"its linear layers end in: {_endings(model)}"
        )
    return family


def _matching(model: nn.Module, pattern: str) -> list[str]:
    expression = re.compile(rf"(?:^|.*\.)(?:{pattern})$")
    return [name for name, module in model.named_modules() if is_linear(module) and expression.match(name)]


def _all_linear(model: nn.Module) -> dict[str, list[str]]:
    heads = getattr(model, "get_output_embeddings", lambda: None)()
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if is_linear(module) and module is not heads and not _HEADS.search(name):
            found.setdefault(_ending(name), []).append(name)
    if not found:
        raise SparseGradError(f"{type(model).__name__} has no linear layer outside its head")
    return found


def _ending(name: str) -> str:
    """A name without what precedes its last number: `encoder.layer.3.output.dense` -> `output.dense`."""
    return re.sub(r"^(.*\.)?\d+\.", "", name)


def _endings(model: nn.Module) -> str:
    endings = dict.fromkeys(_ending(name) for name, module in model.named_modules() if is_linear(module))
    return ", ".join(endings) or "(it has none)"


def checked_shapes(model: nn.Module, layers: Mapping[str, Sequence[str]]) -> dict[str, tuple[int, int]]:
    """Kind -> (D_out, D_in) of layers that can be replaced, one by one, without touching anything else.

    Raises:
        SparseGradError: no layer is named, a name is no linear layer or stands there twice, a layer shares its weight
            with another module (replacing it would untie them), or layers of a kind differ in shape.
    """
    if not layers:
        raise SparseGradError("layers is empty: name at least one kind, as find_layers does")
    owners: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(path.rpartition(".")[0])
    shapes: dict[str, tuple[int, int]] = {}
    named: set[str] = set()
    for kind, names in layers.items():
        if not names:
            raise SparseGradError(f"kind {kind!r} names no layer")
        for name in names:
            layer = _linear_layer(model, name)
            if name in named:
                raise SparseGradError(f"{name!r} is named twice")
            named.add(name)
            tied = [owner for owner in owners[id(layer.weight)] if owner != name]
            if tied:
                raise SparseGradError(f"{name!r} shares its weight with {tied[0]!r}: replacing it would untie them")
            shape = weight_shape(layer)
            if shapes.setdefault(kind, shape) != shape:
                raise SparseGradError(
                    f"layers of kind {kind!r} must share one shape (they share their bases): {names[0]!r} is "
                    f"{shapes[kind][0]} x {shapes[kind][1]}, {name!r} is {shape[0]} x {shape[1]}"
                )
    return shapes


def _linear_layer(model: nn.Module, name: str) -> nn.Module:
    try:
        layer = model.get_submodule(name) if name else None
    except AttributeError:
        layer = None
    if layer is None:
        raise SparseGradError(
            f"{type(model).__name__} has no layer {name!r}; its linear layers end in: {_endings(model)}"
        )
    if not is_linear(layer):
        raise SparseGradError(f"{name!r} is a {type(layer).__name__}, not a plain linear layer")
    return layer
