"""Any tuner of Hugging Face's peft as a method: `peft:NAME[BUDGET]`, or `peft:adapter_config.json`.

NAME is one of peft's types in lower case, or a `VARIANTS` of LoRA. The tuner gets the harness's target layers and its
own defaults otherwise; a configuration that peft has saved gives all else, and its targets are left out. peft is an
optional extra and is imported when such a method is asked for.

What is measured is peft's code as it is: its layers are modules that call the plain layer, so that they hold more
temporaries than the functions of this package, and none of them skips zero rows of dL/dY.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from baselines.method import Knob, LayerBytes, Method, MethodError, Setting, Shape

PREFIX = "peft:"
# Names that are a type of peft's with options.
VARIANTS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "dora": ("lora", {"use_dora": True}),
    "pissa": ("lora", {"init_lora_weights": "pissa"}),
    "rslora": ("lora", {"use_rslora": True}),
    "qlora": ("lora", {}),
}
# Names whose target layers become bitsandbytes' Linear4bit first, in NF4 with double quantization.
FOUR_BIT = ("qlora",)
# The field that is the budget, where it is not the rank `r`; its name says which counts it takes.
BUDGETS = {
    "boft": "boft_block_size",
    "c3a": "block_size",
    "fourierft": "n_frequency",
    "oft": "oft_block_size",
    "waveft": "n_frequency",
}
# Types that have targets, which are not layers whose input and output alone they need.
OTHERS = ("adaption_prompt", "poly", "shadow", "trainable_tokens")
ADALORA_STEPS = 1000  # its schedule needs an end; what it stores does not hang on it
RANK = "r"


def is_peft(name: str) -> bool:
    """Whether a method's name is of peft's."""
    return name.startswith(PREFIX)


@cache
def tuner_method(name: str) -> type[Method]:
    """The method of a name such as `peft:lora`. Raises `MethodError` where peft is missing or has none of that name."""
    try:
        import peft.mapping
    except ImportError:
        raise MethodError(f"{name} needs peft, an optional extra: pip install peft") from None
    word = name.removeprefix(PREFIX)
    if word in FOUR_BIT:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            raise MethodError(
                f"{name} needs bitsandbytes, an optional extra: pip install bitsandbytes, or take qlora, which does not"
            ) from None
    if word.endswith(".json"):
        given = _saved(name, word)
        kind, options = str(given.pop("peft_type", "")).lower(), given
    else:
        kind, options = VARIANTS.get(word, (word, {}))
    kinds = {kind.value.lower(): cls for kind, cls in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in kinds:
        known = ", ".join(sorted((*kinds, *VARIANTS)))
        raise MethodError(
            f"peft has no tuner {kind!r}, asked for as {name}; it has {known}, or give a saved config.json"
        )
    config_class = kinds[kind]
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    if strange := sorted(set(options) - set(fields)):
        raise MethodError(f"{name}: peft's {kind} has no option {strange[0]!r}")
    if "target_modules" not in fields or kind in OTHERS:
        raise MethodError(f"{name} does not act on linear layers, which is what this suite compares")
    budget = None if word.endswith(".json") else BUDGETS.get(kind, RANK if RANK in fields else None)
    members: dict[str, object] = {
        "__doc__": f"peft's {kind}, whatever its options.",
        "name": name,
        "kind": kind,
        "config_class": config_class,
        "options": dict(options),
        "budget_field": budget,
        "four_bit": word in FOUR_BIT,
    }
    if budget is not None:
        members["knob"] = Knob(budget if budget != RANK else "rank", default=fields[budget].default)
    return type(f"Peft{kind.title()}", (PeftTuner, Method), members)


class PeftTuner:
    """A tuner of peft's, put into the model in place: what `tuner_method` makes a `Method` of, a name at a time."""

    kind: str
    config_class: type
    options: Mapping[str, Any]
    budget_field: str | None
    four_bit: bool

    def prepare(self, model, batches):
        """Inject the tuner into the target layers and set what trains. New weights come from the setting's seed."""
        self.check_model(model)
        names = self.target_names()
        dtype = model.get_submodule(names[0]).weight.dtype
        if self.four_bit:
            in_four_bits(model, names, self.name)
        weights = [model.get_submodule(name).weight for name in names]
        before = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        with torch.random.fork_rng():
            torch.manual_seed(self.setting.seed)
            self._tuner = self._injected(model, names)
        added = {name: p for name, p in model.named_parameters() if id(p) not in before}
        own = [parameter for parameter in added.values() if parameter.requires_grad]
        self._kept = [parameter for parameter in added.values() if not parameter.requires_grad]
        self._kept += [buffer for buffer in model.buffers() if id(buffer) not in before]
        if self.four_bit:
            self._kept += [tensor for weight in weights for tensor in _magnitudes(weight.quant_state)]
        for parameter in own:
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(self.setting.own_dtype(dtype))
        self._steps = 0
        self.freeze(model, own, weights)

    def after_step(self, model):
        """AdaLoRA moves ranks between layers by what gradients say of them."""
        allocate = getattr(self._tuner, "update_and_allocate", None)
        if allocate is not None:
            self._steps += 1
            allocate(self._steps)

    def basis_tensors(self, model):
        """What the tuner keeps and does not train: shared projections, masks, indices."""
        return iter(self._kept)

    def export(self, model):
        """Merge as peft does it. Raises `MethodError` for a tuner that cannot."""
        if self.four_bit:
            raise MethodError(f"{self.name} cannot be merged into plain layers: peft would round the sum to four bits")
        merge = getattr(self._tuner, "merge_and_unload", None)
        try:
            merged = None if merge is None else merge()
        except (NotImplementedError, AttributeError) as error:
            raise MethodError(f"{self.name} cannot be merged into plain layers: {error}") from error
        if merged is None:
            raise MethodError(f"{self.name} cannot be merged into plain layers")
        return merged

    def layer_params(self, shape):
        """The trainable entries that the tuner adds to one layer."""
        return self._on_one_layer(shape)[0]

    @classmethod
    def largest_budget(cls, shapes):
        """The rank of the smallest weight; peft itself says which other counts it takes."""
        return min(min(shape) for shape in shapes)

    def formula(self, shape, tokens, dtype):
        """W, and what the tuner adds to a layer; what it saves for backward is not claimed."""
        _, own, kept = self._on_one_layer(shape, dtype)
        weight = -(-shape[0] * shape[1] // 2) if self.four_bit else shape[0] * shape[1] * dtype.itemsize
        return LayerBytes(parameter=weight + own, gradient=own, optimizer=2 * own, basis=kept)

    def _injected(self, model: nn.Module, names: Sequence[str]):
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        try:
            config = self._config(names)
            tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, config, adapter_name="default")
        except (ValueError, TypeError, KeyError, NotImplementedError, AttributeError, ImportError) as error:
            raise MethodError(f"{self.name} cannot be applied: {' '.join(str(error).split())}") from error
        return tuner

    def _config(self, names: Sequence[str]):
        options: dict[str, Any] = {"target_modules": list(names), **self.options}
        fields = {field.name for field in dataclasses.fields(self.config_class)}
        if self.budget_field is not None:
            options[self.budget_field] = self.budget
        if self.kind == "lora":
            # As this package's own: without it the same rank would be scaled otherwise.
            options.setdefault("lora_alpha", 2 * options.get(RANK, 8))
        if self.kind == "adalora":
            options |= {"target_r": options.pop(RANK), "init_r": -(-3 * self.budget // 2), "total_step": ADALORA_STEPS}
        if "feedforward_modules" in fields and "feedforward_modules" not in options:
            # IA3 scales what comes into the second layer of an MLP, and what leaves the others.
            options["feedforward_modules"] = [name for name in names if name in self.setting.layers.get("down", ())]
        return self.config_class(**options)

    def _on_one_layer(self, shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[int, int, int]:
        """(trained entries, bytes of what trains, bytes of what is kept besides) of a layer of (D_out, D_in)."""
        return _added(type(self), self.budget, self.setting.adapter_dtype, shape, dtype)


@cache
def _added(cls: type[PeftTuner], budget, adapter_dtype: str, shape: Shape, dtype: torch.dtype) -> tuple[int, int, int]:
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)

    model = One()
    method = cls(budget, Setting({"down": ["layer"]}, adapter_dtype=adapter_dtype, train_rest="none"))
    method.prepare(model, iter(()))
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return sum(p.numel() for p in own), _bytes(own), _bytes(method.basis_tensors(model))


def in_four_bits(model: nn.Module, names: Sequence[str], method: str) -> None:
    """Put bitsandbytes' Linear4bit in the place of linear layers.

    Raises `MethodError` for other layers, such as Conv1D, and for fake tensors, of which its weights cannot be made.
    """
    import bitsandbytes

    layers = {name: model.get_submodule(name) for name in names}
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise MethodError(
                f"{method} cannot be applied: bitsandbytes has no 4-bit {type(layer).__name__}, which {name} is"
            )
        if isinstance(layer.weight, FakeTensor):
            raise MethodError(
                f"{method} is measured, and not predicted: bitsandbytes' weights need values; predict qlora instead, "
                "which stores the same"
            )
    for name, layer in layers.items():
        # Its own weight would be made, and let go again.
        new = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, quant_type="nf4", device="meta"
        )
        # The packing for inference on CPUs, which an evaluation would begin, has no backward.
        new.support_avx512bf16_for_cpu = False
        new.bias = layer.bias
        new.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=new
        )
        new.weight = new.weight.to(layer.weight.device)  # which quantizes
        model.set_submodule(name, new)
    model.is_loaded_in_4bit = True  # by which peft knows its layers for these


def _magnitudes(state) -> Iterator[Tensor]:
    """What bitsandbytes keeps of a weight beside its codes: magnitudes, their own scales and mean, and both tables."""
    yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)


def _bytes(tensors: Iterator[Tensor] | Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _saved(name: str, path: str) -> dict[str, Any]:
    """The options of a configuration that peft has saved, without its targets and what is null."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MethodError(f"{name}: {path} cannot be read: {error}") from error
    if not isinstance(found, dict) or "peft_type" not in found:
        raise MethodError(f"{name}: {path} is no configuration that peft has saved: it has no peft_type")
    left_out = ("target_modules", "base_model_name_or_path", "task_type", "inference_mode", "peft_version")
    return {key: value for key, value in found.items() if key not in left_out and value is not None}
