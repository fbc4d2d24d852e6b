"""The two factors of each layer's weight gradient against autograd's gradient, and when they come and go."""

import copy

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from sparsegrad import find_layers
from sparsegrad.gradients import default_backward, stream_gradients

D_IN, D_HIDDEN = 5, 7
LAYERS = {"up": ["up"], "down": ["down"]}


class Block(nn.Module):
    """`x + down(relu(up(x)))`, as many times over as `uses`."""

    def __init__(self, uses: int = 1, checkpointed: bool = False):
        super().__init__()
        self.up, self.down, self.relu = nn.Linear(D_IN, D_HIDDEN), nn.Linear(D_HIDDEN, D_IN), nn.ReLU(inplace=True)
        self.uses, self.checkpointed = uses, checkpointed

    def mlp(self, x):
        return self.down(input=self.relu(self.up(x)))

    def forward(self, x):
        for _ in range(self.uses):
            x = x + (checkpoint(self.mlp, x, use_reentrant=False) if self.checkpointed else self.mlp(x))
        return x


def backward(model, batch):
    model(batch).square().sum().backward()


def streamed(model, batch, layers=LAYERS, backward=backward):
    """Layer name -> dY and X, in the order in which they came."""
    found = {}

    def consume(kind, name, dy, x):
        assert name in layers[kind]
        assert name not in found
        found[name] = (dy, x)

    stream_gradients(model, layers, [batch], backward, consume)
    return found


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("uses", [1, 3])
def test_the_factors_multiply_to_the_gradient(uses, checkpointed, unchanged):
    model, batch = Block(uses, checkpointed).double(), torch.randn(2, 3, D_IN, dtype=torch.float64)
    twin = copy.deepcopy(model)
    backward(twin, batch)
    with unchanged(model):
        found = streamed(model, batch)
    assert list(found) == ["down", "up"]
    for name, (dy, x) in found.items():
        assert len(dy) == len(x) == uses * 6
        torch.testing.assert_close(dy.T @ x, twin.get_submodule(name).weight.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama"])
def test_the_factors_of_a_transformers_model(model_type, tiny):
    model, batch = tiny(model_type)
    layers = find_layers(model)
    twin = copy.deepcopy(model)
    default_backward(twin, batch)
    found = streamed(model, batch, layers, default_backward)
    assert sorted(found) == sorted(name for names in layers.values() for name in names)
    for name, (dy, x) in found.items():
        expected = twin.get_submodule(name).weight.grad
        # Conv1D stores the transpose.
        torch.testing.assert_close(dy.T @ x, expected.T if model_type == "gpt2" else expected)


def test_they_come_in_the_weights_dtype():
    def mixed(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch).square().sum()
        loss.backward()

    for dy, x in streamed(Block(), torch.randn(3, D_IN), backward=mixed).values():
        assert dy.dtype == x.dtype == torch.float32


def test_they_come_before_the_inputs_gradient_and_the_input_goes_with_them():
    model = nn.Sequential(*(nn.Linear(D_IN, D_IN) for _ in range(3)))
    events, inputs = [], []

    def note(event):
        events.append((event, sum(not each.expired() for each in inputs)))

    def watching(model, batch):
        x = batch.requires_grad_()
        for i, layer in enumerate(model):
            # Its derivative needs neither side, so that nothing but the layer keeps X.
            x = 2 * x
            x.register_hook(lambda _, i=i: note(f"gradient of {i}'s input"))
            x = layer(x)
        x.sum().backward()

    def consume(kind, name, dy, x):
        inputs.append(StorageWeakRef(x.untyped_storage()))
        note(f"factors of {name}")

    stream_gradients(model, {"all": ["0", "1", "2"]}, [torch.randn(4, D_IN)], watching, consume)
    assert events == [
        (event, alive) for i in "210" for event, alive in ((f"factors of {i}", 1), (f"gradient of {i}'s input", 0))
    ]


def test_no_weight_gradient_is_made(allocations):
    model = nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 300))
    with allocations() as made:
        streamed(model, torch.randn(4, 300), {"up": ["0"], "down": ["1"]})
    assert 0 < made.largest <= 4 * 4 * 400


def test_an_input_that_is_changed_after_its_use_is_refused():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(D_IN, D_HIDDEN)

        def forward(self, x):
            x = 2 * x
            y = self.up(x)
            x.add_(1)
            return y

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        streamed(Changing(), torch.randn(3, D_IN), {"up": ["up"]})


def test_what_consume_raises_is_raised_and_no_hook_stays(unchanged):
    model, batch = Block(), torch.randn(3, D_IN)

    class Refused(RuntimeError):
        """What the test raises."""

    def refuse(kind, name, dy, x):
        raise Refused

    with unchanged(model), pytest.raises(Refused):
        stream_gradients(model, LAYERS, [batch], backward, refuse)
    backward(model, batch)
    assert all(parameter.grad is not None for parameter in model.parameters())
