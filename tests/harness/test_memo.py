"""A memo's answers against FakeTensorMode's own, the second time as the first."""

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness.memo import Memo


class Remembering(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.run = Memo()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs or {})
        return self.run(func, args, kwargs or {})


@pytest.fixture
def mode():
    with FakeTensorMode() as fake, Remembering():
        yield fake


@pytest.fixture
def dispatched(monkeypatch):
    """Operations that FakeTensorMode was asked about."""
    asked = []
    dispatch = FakeTensorMode.dispatch

    def counted(self, func, *args, **kwargs):
        if func is not torch.ops.prim.device.default:
            asked.append(func)
        return dispatch(self, func, *args, **kwargs)

    monkeypatch.setattr(FakeTensorMode, "dispatch", counted)
    return asked


def described(result, *given):
    """What a result is: its metadata, and whose storage it has."""
    storages = [tensor.untyped_storage()._cdata for tensor in given]
    parts = []
    for each in tree_leaves(result):
        assert isinstance(each, FakeTensor)
        address = each.untyped_storage()._cdata
        of = storages.index(address) if address in storages else None
        same = [i for i, tensor in enumerate(given) if tensor is each]
        metadata = (each.shape, each.stride(), each.storage_offset(), each.dtype, each.device, each.requires_grad)
        parts.append((*metadata, each.untyped_storage().nbytes(), of, same))
    return type(result), parts


OPERATIONS = {
    "product": lambda a, b: a @ b,
    "product of a transposed": lambda a, b: b.T @ a.T,
    "sum": lambda a, b: a + 1,
    "sum over a dimension": lambda a, b: a.sum(1),
    "broadcast": lambda a, b: a[:, None] * b.T[None],
    "comparison": lambda a, b: a > 0,
    "view": lambda a, b: a.view(6, 2),
    "slice": lambda a, b: a[1:3, 1:],
    "transpose": lambda a, b: a.T,
    "expanded": lambda a, b: a[0].expand(5, 4),
    "split": lambda a, b: torch.split(a, 1, dim=1),
    "bits as integers": lambda a, b: a.view(torch.int32),
    "conversion": lambda a, b: a.to(torch.bfloat16),
    "conversion to what it is": lambda a, b: a.to(torch.float32),
    "two results": lambda a, b: torch.max(a, 1),
    "in place": lambda a, b: a.mul_(2),
    "in place, of a view": lambda a, b: a[1:].add_(1),
    "written to": lambda a, b: torch.mm(a, b, out=torch.empty(3, 3)),
    "dropout": lambda a, b: torch.native_dropout(a, 0.5, True),
    "layer normalisation": lambda a, b: torch.native_layer_norm(a, [4], None, None, 1e-5),
    "many in place": lambda a, b: torch._foreach_mul_([a, b], 2.0) or [a, b],
    "many": lambda a, b: torch._foreach_sqrt([a, b]),
    "copied in place": lambda a, b: a.copy_(b.T),
    "empty": lambda a, b: torch.empty(7, 2, dtype=torch.uint8),
    "grown": lambda a, b: a.new_zeros(2).resize_(9),
    "attention": lambda a, b: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*[a.view(1, 1, 3, 4)] * 3),
}


def operands():
    return torch.empty(3, 4), torch.empty(4, 3)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_an_answer_is_the_same_from_memory(operation):
    with FakeTensorMode():
        given = operands()
        expected = described(operation(*given), *given)
    with FakeTensorMode(), Remembering():
        for _ in range(3):
            given = operands()
            assert described(operation(*given), *given) == expected


def test_an_operation_is_asked_once(mode, dispatched):
    a, b = operands()
    a @ b
    del dispatched[:]
    a @ b
    torch.empty(3, 4) @ torch.empty(4, 3)
    assert dispatched == []


def test_results_are_new_each_time(mode):
    a, b = operands()
    results = [a @ b for _ in range(3)]
    assert len({each.untyped_storage()._cdata for each in results}) == 3


@pytest.mark.parametrize(
    ("first", "second", "differs"),
    [
        (lambda a: a + 1, lambda a: a + 1.0, "dtype"),
        (lambda a: a + True, lambda a: a + 1.0, "dtype"),
        (lambda a: a.sum(0), lambda a: a.sum(1), "shape"),
        (lambda a: a.T.clone(), lambda a: a.T.contiguous().T.clone(), "shape"),
        (lambda a: a.sum(0, keepdim=True), lambda a: a.sum(0), "shape"),
        (lambda a: torch.empty_like(a), lambda a: torch.empty_like(a, dtype=torch.int8), "dtype"),
    ],
)
def test_what_differs_is_not_taken_for_the_same(mode, first, second, differs):
    a = torch.empty(3, 4, dtype=torch.int64)
    one, other = getattr(first(a), differs), getattr(second(a), differs)
    assert one != other
    assert (getattr(first(a), differs), getattr(second(a), differs)) == (one, other)


def test_the_default_dtype_is_part_of_the_question(mode):
    assert torch.empty(2).dtype == torch.float32
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.empty(2).dtype == torch.float64
    finally:
        torch.set_default_dtype(before)


def test_what_changes_its_argument_happens_each_time(mode):
    for _ in range(3):
        out = torch.empty(0)
        torch.mm(*operands(), out=out)
        assert out.shape == (3, 3)
        grown = torch.empty(2)
        grown.resize_(9)
        assert grown.untyped_storage().nbytes() == 36
        turned = torch.empty(3, 4)
        turned.t_()
        assert turned.shape == (4, 3)


def test_a_tensor_given_twice_is_one(mode):
    for _ in range(3):
        a = torch.empty(3, 4)
        assert a.add_(a) is a


def test_constants_keep_their_values(mode):
    for value in (2, 3):
        assert int(torch.tensor(value)) == value
        constant = torch.tensor(value)
        constant += 1
        assert int(constant) == value + 1


def test_a_question_about_values_is_still_an_error(mode):
    for _ in range(2):
        with pytest.raises(DataDependentOutputException):
            bool(torch.empty(1) > 0)


def test_gradients_are_as_without_a_memo():
    def gradients():
        w, x = torch.empty(4, 3, requires_grad=True), torch.empty(5, 4, requires_grad=True)
        for _ in range(2):
            torch.nn.functional.gelu(x @ w).T.sum().backward()
        return described([w.grad, x.grad], w, x)

    with FakeTensorMode():
        expected = gradients()
    with FakeTensorMode(), Remembering():
        assert gradients() == gradients() == expected
