"""The weight gradients of chosen layers, one at a time: each is consumed inside backward, as soon as it exists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from sparsegrad.adapted import is_transposed
from sparsegrad.errors import SparseGradError


def default_backward(model: nn.Module, batch: Mapping[str, object]) -> None:
    """One forward and backward of a transformers model whose batch holds its labels."""
    model(**batch).loss.backward()


def stream_gradients(
    model: nn.Module,
    layers: Mapping[str, Sequence[str]],
    batches: Iterable[object],
    backward: Callable[[nn.Module, object], None],
    consume: Callable[[str, str, Tensor], None],
) -> None:
    """Call `consume(kind, name, G)` with each named layer's weight gradient G (D_out, D_in), for every batch.

    Everything but the named layers is frozen meanwhile, and the model is left as it was. At no time do two layers'
    gradients live, as long as `consume` keeps none. Parameters' `.grad` must be None.

    Raises `SparseGradError` where gradients are held already, and what `consume` raises, with the layer's name.
    """

    def consumer(kind: str, name: str, transposed: bool) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            try:
                consume(kind, name, gradient.T if transposed else gradient)
            except SparseGradError as error:
                raise SparseGradError(f"layer {name!r}: {error}") from None

        return hook

    named = [(kind, name, model.get_submodule(name)) for kind, names in layers.items() for name in names]
    with _only_trainable(model, [layer.weight for _, _, layer in named]):
        hooks = []
        try:
            for kind, name, layer in named:
                hook = consumer(kind, name, is_transposed(layer))
                hooks.append(layer.weight.register_post_accumulate_grad_hook(hook))
            for batch in batches:
                backward(model, batch)
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def _only_trainable(model: nn.Module, trainable: Sequence[Tensor]) -> Iterator[None]:
    """Only these parameters require gradients inside; flags come back, and no gradient stays, whatever happens."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    if any(parameter.grad is not None for parameter, _ in before):
        raise SparseGradError("the model holds gradients; call zero_grad(set_to_none=True) before preparing")
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
            parameter.grad = None
