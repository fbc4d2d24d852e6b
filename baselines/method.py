"""The interface of a fine-tuning method: what the harness calls, and in which order.

A method is one file in this package with one class (or a few) deriving from `Method`. The harness builds it with a
budget and a `Setting`, then calls `prepare`, `optimizers`, and in each step `after_backward` and `after_step`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from baselines.adamw8bit import AdamW8bit
from sparsegrad import SparseAdam, SparseSGD, merge
from sparsegrad.adapted import adapted_layers, check_unconverted, is_linear, weight_shape
from sparsegrad.errors import SparseGradError
from sparsegrad.gradients import default_backward
from sparsegrad.support import resolve_nnz

Shape = tuple[int, int]
Budget = int | float | str | None

# Names of the modules that a task adds to a pretrained model: they train in every method and regime.
TASK_HEAD = re.compile(r"(^|\.)(classifier|score|qa_outputs)\.")

TRAIN_REST = ("all", "none")
ADAPTER_DTYPES = ("same", "float32")
OPTIMIZERS = ("adamw", "adamw8bit", "sgd")
OPTIMIZER_IMPLS = ("for-loop", "foreach", "fused")


class MethodError(ValueError):
    """A method that cannot be applied as asked."""


@dataclass(frozen=True)
class Setting:
    """What the harness decides for every method alike. Raises `MethodError` for a word that it does not know."""

    layers: Mapping[str, Sequence[str]]  # kind -> names of the target layers
    train_rest: str = "all"  # all: everything outside the target weights trains; none: the method's own and the head
    adapter_dtype: str = "same"  # same: the model's dtype; float32
    optimizer: str = "adamw"
    optimizer_impl: str = "for-loop"
    accumulate: int = 1  # backward passes whose gradients one step of the optimizers takes
    calibration_steps: int = 30
    seed: int = 0
    backward: Callable[[nn.Module, object], None] = field(default=default_backward)

    def __post_init__(self):
        words = {
            "train_rest": TRAIN_REST,
            "adapter_dtype": ADAPTER_DTYPES,
            "optimizer": OPTIMIZERS,
            "optimizer_impl": OPTIMIZER_IMPLS,
        }
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise MethodError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.optimizer == "adamw8bit" and self.optimizer_impl != "for-loop":
            raise MethodError(f"adamw8bit steps in a for-loop alone, got the optimizer_impl {self.optimizer_impl}")
        if self.accumulate < 1:
            raise MethodError(f"accumulate must be at least 1, got {self.accumulate}")

    def own_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype of parameters that a method adds to weights of `model_dtype`."""
        return torch.float32 if self.adapter_dtype == "float32" else model_dtype


@dataclass(frozen=True)
class Knob:
    """The one number that trades memory for capacity."""

    name: str  # rank, k, entries
    default: int | float
    accepts_density: bool = False


@dataclass(frozen=True)
class ParameterCounts:
    """Counts of a prepared model; those that only a step can tell are measured by the harness."""

    total_params: int
    trainable_params: int
    budget_params: int | None


@dataclass(frozen=True)
class LayerBytes:
    """The bytes a method claims for ONE target layer, by category, in a steady-state step.

    `basis` is what layers of a kind share, so it is paid once per kind. `activation` is what the layer keeps for
    backward beyond its input X, which the layer before it, or LoRA's own factors, may hold as well; `keeps_input` says
    whether X must live until this layer's backward.
    """

    parameter: int
    gradient: int
    optimizer: int
    activation: int = 0
    basis: int = 0
    keeps_input: bool = True

    @property
    def resident(self) -> int:
        """Parameters, optimizer state and bases: what stays between steps."""
        return self.parameter + self.optimizer + self.basis


class Method(ABC):
    """A way to fine-tune a model. Subclasses set `name`, and `knob` where they have a budget."""

    name: ClassVar[str]
    knob: ClassVar[Knob | None] = None
    # Steps after which the memory pattern repeats; a peak is the peak of a whole period. Where the steps of a long one
    # are of few kinds, one of each is measured in its stead: `begin_period` and `step_shares`.
    period: ClassVar[int] = 1
    # Whether the gradients of several backward passes add up to that of one over all their examples. They do not where
    # each pass chooses entries by its own examples alone.
    accumulates: ClassVar[bool] = True

    def __init__(self, budget: Budget, setting: Setting):
        if setting.accumulate > 1 and not self.accumulates:
            raise MethodError(
                f"{self.name} chooses entries anew in each backward pass, so that gradients accumulated over "
                f"{setting.accumulate} are not those of one batch {setting.accumulate} times as large; "
                "use --accumulate 1 with a larger --batch"
            )
        if setting.optimizer != OPTIMIZERS[0] and type(self).optimizers is not Method.optimizers:
            raise MethodError(
                f"{self.name} makes its optimizers itself, for which {setting.optimizer} cannot stand in; "
                f"leave --optimizer {setting.optimizer} out"
            )
        if setting.optimizer == "adamw8bit" and type(self).sparse_parameters is not Method.sparse_parameters:
            raise MethodError(
                f"{self.name} has sparse gradients, for which AdamW8bit has no step; leave --optimizer adamw8bit out"
            )
        if self.knob is None:
            if budget is not None:
                raise MethodError(f"{self.name} has no budget, got {self.name}[{budget}]")
        else:
            budget = self.knob.default if budget is None else budget
            self.check_budget(budget)
        self.budget = budget
        self.setting = setting

    @classmethod
    def check_budget(cls, budget: Budget) -> None:
        """Raise `MethodError` for a budget that no layer could take."""
        if isinstance(budget, float) and cls.knob.accepts_density:
            if not 0 < budget <= 1:
                raise MethodError(f"density must be in (0, 1], got {cls.name}[{budget}]")
        elif isinstance(budget, bool) or not isinstance(budget, int):
            kinds = "an integer count or a density in (0, 1]" if cls.knob.accepts_density else "an integer"
            raise MethodError(f"the budget of {cls.name} ({cls.knob.name}) is {kinds}, got {cls.name}[{budget}]")
        elif budget < 1:
            raise MethodError(
                f"the budget of {cls.name} ({cls.knob.name}) must be at least 1, got {cls.name}[{budget}]"
            )

    # --- what a method does

    @abstractmethod
    def prepare(self, model: nn.Module, batches: Iterable[object]) -> None:
        """Change the model in place: calibrate, convert, freeze. `batches` are made one at a time, when drawn."""

    def optimizers(self, model: nn.Module, lr: float) -> list[Optimizer]:
        """SparseAdam or SparseSGD for parameters with COO gradients; AdamW, AdamW8bit or SGD for all others.

        A method that is itself a way to step weights overrides this, and then takes no other optimizer.
        """
        sparse = list(self.sparse_parameters(model))
        known = {id(parameter) for parameter in sparse}
        dense = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        result: list[Optimizer] = [self.sparse_optimizer(sparse, lr)] if sparse else []
        return [*result, self.dense_optimizer(dense, lr)] if dense else result

    def sparse_optimizer(self, parameters: Sequence[nn.Parameter], lr: float) -> Optimizer:
        """What steps the parameters with COO gradients, by the setting's `optimizer`."""
        return SparseSGD(parameters, lr=lr) if self.setting.optimizer == "sgd" else SparseAdam(parameters, lr=lr)

    def dense_optimizer(self, parameters: Sequence[nn.Parameter], lr: float) -> Optimizer:
        """What steps parameters with dense gradients, by the setting's `optimizer` and `optimizer_impl`."""
        if self.setting.optimizer == "adamw8bit":
            return AdamW8bit(parameters, lr=lr)
        make = sgd if self.setting.optimizer == "sgd" else adamw
        return make(parameters, lr, self.setting.optimizer_impl)

    def sparse_parameters(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """The trainable parameters whose gradients are sparse COO tensors."""
        return iter(())

    def after_backward(self, model: nn.Module) -> None:  # noqa: B027
        """Called once a step, when the gradients of all its backward passes exist, before the optimizers step."""

    def after_step(self, model: nn.Module) -> None:  # noqa: B027
        """Called when the optimizers have stepped, before gradients are freed."""

    def begin_period(self, optimizers: Sequence[Optimizer]) -> None:  # noqa: B027
        """Called before each period that is measured, where the next step must be the first of its kinds."""

    def step_shares(self) -> Sequence[float]:
        """How often each step of a measured period happens in training; they add up to 1 and weigh its times."""
        return [1 / self.period] * self.period

    def basis_tensors(self, model: nn.Module) -> Iterator[Tensor]:
        """Tensors that are neither parameters nor optimizer state, but that the method keeps: bases, fixed indices."""
        return iter(())

    def export(self, model: nn.Module) -> nn.Module:
        """The plain model that computes what was trained; the given model is changed in place."""
        return merge(model) if any(adapted_layers(model)) else model

    # --- what a method says of itself

    def budget_params(self, shapes: Sequence[Shape]) -> int | None:
        """What the budget stands for, summed over target weights of (D_out, D_in); None without a budget.

        Entries written per step for `sparsegrad` and `meprop-*`, stored trainable entries for the others.
        """
        return None if self.knob is None else sum(self.layer_params(shape) for shape in shapes)

    def layer_params(self, shape: Shape) -> int:
        """`budget_params` of one layer."""
        raise TypeError(f"{self.name} has a budget but does not say its parameters")

    @classmethod
    def largest_budget(cls, shapes: Sequence[Shape]) -> int:
        """The largest integer budget that every layer can take."""
        raise TypeError(f"{cls.name} has a budget but does not say its range")

    @abstractmethod
    def formula(self, shape: Shape, tokens: int, dtype: torch.dtype) -> LayerBytes:
        """The bytes claimed for a layer of (D_out, D_in), without its bias, at `tokens` rows of input, with AdamW."""

    def counts(self, model: nn.Module, shapes: Sequence[Shape]) -> ParameterCounts:
        """Parameter counts of the prepared model; `shapes` are those of the target weights."""
        parameters = list(model.parameters())
        return ParameterCounts(
            total_params=sum(p.numel() for p in parameters),
            trainable_params=sum(p.numel() for p in parameters if p.requires_grad),
            budget_params=self.budget_params(shapes),
        )

    # --- shared by methods

    def freeze(self, model: nn.Module, own: Iterable[Tensor], target_weights: Iterable[Tensor]) -> None:
        """Set `requires_grad`: `own` trains, `target_weights` do not, the rest as the regime says."""
        frozen = {id(weight) for weight in target_weights}
        trained = {id(parameter) for parameter in own}
        for name, parameter in model.named_parameters():
            rest = self.setting.train_rest == "all" or TASK_HEAD.search(name) is not None
            parameter.requires_grad_(id(parameter) in trained or (rest and id(parameter) not in frozen))

    def target_names(self) -> list[str]:
        """Names of all target layers, kind by kind."""
        return [name for names in self.setting.layers.values() for name in names]

    def check_model(self, model: nn.Module) -> None:
        """Raise `MethodError`, with nothing changed yet, for a model adapted already or too small for the budget."""
        try:
            check_unconverted(model)
        except SparseGradError as error:
            raise MethodError(f"{self.name} cannot be applied: {error}") from None
        self.check_budget_fits(target_shapes(model, self.setting.layers))

    def check_budget_fits(self, shapes: Sequence[Shape]) -> None:
        """Raise `MethodError` where an integer budget is more than the target weights can take."""
        if isinstance(self.budget, int):
            largest = self.largest_budget(shapes)
            if self.budget > largest:
                raise MethodError(
                    f"the budget of {self.name} ({self.knob.name}) must be at most {largest} for these layers, "
                    f"got {self.name}[{self.budget}]"
                )


class EntryMethod(Method):
    """Base of methods whose budget is a number of entries of each target weight: a count, or a density in (0, 1]."""

    knob = Knob("entries per layer", default=0.01, accepts_density=True)

    def entries(self, shape: Shape) -> int:
        """The entries that the budget keeps of a weight of (D_out, D_in)."""
        if isinstance(self.budget, float):
            return resolve_nnz(shape, density=self.budget)
        return resolve_nnz(shape, nnz=self.budget)

    def layer_params(self, shape):
        """The kept entries."""
        return self.entries(shape)

    @classmethod
    def largest_budget(cls, shapes):
        """The size of the smallest weight."""
        return min(shape[0] * shape[1] for shape in shapes)


def target_shapes(model: nn.Module, layers: Mapping[str, Sequence[str]]) -> list[Shape]:
    """(D_out, D_in) of every target layer of an unconverted model.

    Raises `MethodError` for a target that is no plain linear layer, or that belongs to two kinds.
    """
    names = [name for of_kind in layers.values() for name in of_kind]
    for name, count in Counter(names).items():
        if count > 1:
            raise MethodError(f"target {name!r} is named {count} times; each layer belongs to one kind")
        if not is_linear(model.get_submodule(name)):
            raise MethodError(
                f"target {name!r} is a {type(model.get_submodule(name)).__name__}, not a plain linear layer"
            )
    return [weight_shape(model.get_submodule(name)) for name in names]


def adamw(parameters: Sequence[nn.Parameter], lr: float, impl: str) -> torch.optim.AdamW:
    """AdamW in the named one of `OPTIMIZER_IMPLS`; weight decay 0, the default of transformers' Trainer."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, foreach=impl == "foreach", fused=impl == "fused")


def sgd(parameters: Sequence[nn.Parameter], lr: float, impl: str) -> torch.optim.SGD:
    """SGD without momentum, so without state, in the named one of `OPTIMIZER_IMPLS`."""
    return torch.optim.SGD(parameters, lr=lr, foreach=impl == "foreach", fused=impl == "fused")


def size(count: int, dtype: torch.dtype) -> int:
    """Bytes of `count` entries."""
    return count * dtype.itemsize


def coo_bytes(nnz: int, dtype: torch.dtype) -> int:
    """Bytes of a two-dimensional COO tensor: values, and two int64 indices each."""
    return size(nnz, dtype) + 2 * size(nnz, torch.int64)
