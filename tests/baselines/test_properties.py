"""What holds for every method on layers of any shape, dtype and budget: nobody picked these by hand."""

import copy
import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from baselines.method import Setting
from baselines.registry import get, methods
from sparsegrad import load, load_optimizers, save

LARGEST_SIDE, MOST_TOKENS = 12, 6
# Of numbers around 1 that went through bases and back.
ROUNDING = {torch.float64: 1e-10, torch.float32: 2e-4}
# The budget that keeps everything of a layer of (D_out, D_in); those that always keep less are not among them. The
# folded form steps in the basis by an optimizer of its own: its steps are compared with the published form's elsewhere.
# GaLore and APOLLO have full fine-tuning's gradient whatever their budget, and other steps: see their own tests.
EVERYTHING = {
    "full": lambda d_out, d_in: None,
    "gmt": lambda d_out, d_in: d_out * d_in,
    "sift": lambda d_out, d_in: 1.0,
    "meprop-example": lambda d_out, d_in: d_out,
    "meprop-unified": lambda d_out, d_in: d_out,
    "meprop-weight": lambda d_out, d_in: d_out * d_in,
    "random-mask": lambda d_out, d_in: 1.0,
    "sparsegrad": lambda d_out, d_in: d_out * d_in,
    "sparsegrad-compact": lambda d_out, d_in: 1.0,
    "sparsegrad-fixed": lambda d_out, d_in: 1.0,
    "sparsegrad-core": lambda d_out, d_in: f"{d_out}x{d_in}",
    "sparsegrad-directions": lambda d_out, d_in: d_in,
}
FORMS = [name for name in methods() if name.startswith("sparsegrad")]


@dataclass(frozen=True)
class Case:
    """A layer, what goes through it, and how much of it a method trains."""

    d_in: int
    d_out: int
    tokens: int
    bias: bool
    dtype: torch.dtype
    seed: int
    budget: int | float | str | None = None


@st.composite
def cases(draw, name):
    sides = st.integers(1, LARGEST_SIDE)
    d_in, d_out, cls = draw(sides), draw(sides), get(name)
    budget = None
    if cls.knob is not None:
        counts = st.integers(1, cls.largest_budget([(d_out, d_in)]))
        budget = draw(st.floats(0.01, 1.0) | counts if cls.knob.accepts_density else counts)
    tokens, seed = draw(st.integers(1, MOST_TOKENS)), draw(st.integers(0, 99))
    # Without a bias bitfit trains nothing, and refuses.
    bias = draw(st.booleans()) or name == "bitfit"
    return Case(d_in, d_out, tokens, bias, draw(st.sampled_from(list(ROUNDING))), seed, budget)


def few(examples):
    """The same examples every time, and not too many."""
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None)


class OneLayer(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.linear = nn.Linear(case.d_in, case.d_out, bias=case.bias, dtype=case.dtype)

    def forward(self, x):
        return self.linear(x)


def passed(model, batch):
    """X, with its gradient, and Y, from dL/dY."""
    x, dy = batch[0].clone().requires_grad_(), batch[1]
    y = model(x)
    y.backward(dy)
    return x, y.detach()


def batches(case):
    generator = torch.Generator().manual_seed(case.seed)
    while True:
        yield [
            torch.randn(case.tokens, side, dtype=case.dtype, generator=generator) for side in (case.d_in, case.d_out)
        ]


def made(name, case):
    """A layer, its twin that nobody touches, and the method that the layer was prepared by."""
    torch.manual_seed(case.seed)
    model = OneLayer(case)
    plain = copy.deepcopy(model)
    setting = Setting(layers={"linear": ["linear"]}, calibration_steps=3, backward=passed, seed=case.seed)
    method = get(name)(case.budget, setting)
    method.prepare(model, batches(case))
    if name == "lora-xs":
        # Which begins next to the layer, and not at it.
        nn.init.zeros_(model.linear.R)
    if name == "qlora":
        # Which begins at the layer in four bits.
        plain.linear.weight.data = model.linear.dense(case.dtype)
    model.zero_grad(set_to_none=True)
    return model, plain, method


def step(model, method, optimizers, batch):
    model.zero_grad(set_to_none=True)
    passed(model, batch)
    method.after_backward(model)
    for optimizer in optimizers:
        optimizer.step()
    method.after_step(model)


def assert_near(found, expected, case):
    torch.testing.assert_close(found, expected, rtol=ROUNDING[case.dtype], atol=ROUNDING[case.dtype] * 10)


@pytest.mark.parametrize("name", methods())
@few(12)
@given(data=st.data())
def test_outputs_and_input_gradients_are_the_layers_until_it_steps_and_exports_are_what_it_became(name, data):
    case = data.draw(cases(name))
    model, plain, method = made(name, case)
    batch = next(batches(case))
    (x, y), (x_plain, y_plain) = passed(model, batch), passed(plain, batch)
    assert_near(y, y_plain, case)
    # MeProp's older forms leave part of dL/dY out of dL/dX too.
    if name not in ("meprop-example", "meprop-unified") or case.budget == case.d_out:
        assert_near(x.grad, x_plain.grad, case)

    optimizers = method.optimizers(model, 1e-2)
    for another in itertools.islice(batches(case), 2):
        step(model, method, optimizers, another)
    with torch.no_grad():
        trained = model(batch[0])
        exported = method.export(model)
        assert_near(exported(batch[0]), trained, case)
    assert type(exported.linear) is nn.Linear
    assert exported.linear.weight.shape == plain.linear.weight.shape
    assert bool((trained == y).all()) == (name == "head")


@pytest.mark.parametrize("name", EVERYTHING)
@few(10)
@given(data=st.data())
def test_where_everything_is_kept_a_step_down_the_gradient_is_full_fine_tunings(name, data):
    drawn = data.draw(cases("full"))
    case = Case(**{**vars(drawn), "dtype": torch.float64, "budget": EVERYTHING[name](drawn.d_out, drawn.d_in)})
    model, plain, method = made(name, case)
    batch = next(batches(case))
    (x, _), (x_plain, _) = passed(model, batch), passed(plain, batch)
    assert_near(x.grad, x_plain.grad, case)
    with torch.no_grad():
        for parameter in (*model.parameters(), *plain.parameters()):
            if parameter.grad is not None:
                parameter.sub_(parameter.grad.to_dense(), alpha=0.1)
    exported = method.export(model)
    assert_near(exported.linear.weight, plain.linear.weight, case)
    if case.bias:
        assert_near(exported.linear.bias, plain.linear.bias, case)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("saved") / "model.safetensors"


@pytest.mark.parametrize("name", FORMS)
@few(8)
@given(data=st.data())
def test_what_is_loaded_goes_on_as_what_was_saved(name, path, data):
    case = data.draw(cases(name))
    model, plain, method = made(name, case)
    optimizers = method.optimizers(model, 1e-2)
    first, second = itertools.islice(batches(case), 2)
    step(model, method, optimizers, first)
    save(model, path, optimizers)
    loaded = load(plain, path)
    again = method.optimizers(loaded, 1e-2)
    load_optimizers(again, path)
    for one, its in ((model, optimizers), (loaded, again)):
        step(one, method, its, second)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
