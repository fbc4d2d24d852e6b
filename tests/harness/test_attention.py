"""The rule that picks the attention kernel, call by call, as PyTorch's sources state it."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness.attention import NoKernel, attend, choose
from benchmarks.harness.cards import card

HALF, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def tensors(dtype, head=64, heads=4, kv_heads=4, queries=16, keys=16):
    q = torch.empty(2, heads, queries, head, dtype=dtype, requires_grad=True)
    return q, *(torch.empty(2, kv_heads, keys, head, dtype=dtype, requires_grad=True) for _ in range(2))


@pytest.mark.parametrize(
    ("gpu", "dtype", "shape", "call", "kernel"),
    [
        ("h100", BF16, {}, {}, "cudnn"),
        ("h100", HALF, {"kv_heads": 2}, {"grouped": True}, "cudnn"),
        ("h100", BF16, {}, {"dropout": 0.125}, "cudnn"),
        ("h100", BF16, {}, {"dropout": 0.1}, "flash"),  # not a sixteenth
        ("h100", BF16, {"head": 192}, {}, "flash"),
        ("h100", BF16, {"head": 20}, {}, "flash"),
        ("h100", BF16, {}, {"mask": True}, "cudnn"),
        ("h100", FP32, {}, {}, "efficient"),
        ("h100", FP32, {"head": 6}, {}, "math"),
        ("h100", FP64, {}, {}, "math"),
        ("b200", BF16, {}, {}, "cudnn"),
        ("rtx-5090", BF16, {}, {}, "flash"),
        ("a100", BF16, {}, {"causal": True}, "flash"),
        ("a100", BF16, {"queries": 8}, {"causal": True}, "efficient"),
        ("a100", HALF, {}, {"mask": True}, "efficient"),
        ("a100", HALF, {"kv_heads": 2}, {"mask": True, "grouped": True}, "math"),
        ("a100", HALF, {"kv_heads": 2}, {"grouped": True}, "flash"),
        ("a100", BF16, {"head": 200}, {}, "flash"),
        ("rtx-4090", BF16, {"head": 200}, {}, "efficient"),
        ("rtx-4090", BF16, {"head": 256}, {}, "flash"),
        ("rtx-4090", BF16, {"head": 256}, {"dropout": 0.1}, "efficient"),
        ("a100", BF16, {"head": 264}, {}, "efficient"),
        ("t4", HALF, {}, {}, "efficient"),
        ("t4", FP32, {"head": 6}, {}, "efficient"),
        ("t4", HALF, {"head": 20}, {}, "math"),
        ("t4", BF16, {}, {}, "math"),
        ("t4", HALF, {"kv_heads": 2}, {"grouped": True}, "math"),
    ],
)
def test_the_kernel_that_torch_picks(gpu, dtype, shape, call, kernel):
    with FakeTensorMode():
        q, k, v = tensors(dtype, **shape)
        if call.get("mask"):
            call = {**call, "mask": torch.empty(2, 1, q.shape[2], k.shape[2], dtype=torch.bool)}
        assert choose(card(gpu), q, k, v, **call) == kernel


def test_what_does_not_train_may_have_any_head_size():
    with FakeTensorMode(), torch.no_grad():
        assert choose(card("rtx-4090"), *tensors(BF16, head=200)) == "flash"


def test_a_kernel_that_is_held_to_and_cannot_says_why():
    with FakeTensorMode():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            assert choose(card("h100"), *tensors(BF16)) == "flash"
            with pytest.raises(NoKernel, match=r"can run on t4: flash takes no compute capability 7\.5"):
                choose(card("t4"), *tensors(HALF))
            with pytest.raises(NoKernel, match=r"flash takes no torch\.float32"):
                choose(card("a100"), *tensors(FP32))
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            assert choose(card("h100"), *tensors(BF16)) == "efficient"
            with pytest.raises(NoKernel, match="efficient takes no grouped keys and values"):
                choose(card("a100"), *tensors(BF16, kv_heads=2), grouped=True)


@pytest.mark.parametrize(
    ("kernel", "head", "masked", "grouped"),
    [
        ("cudnn", 64, False, True),
        ("cudnn", 64, True, True),
        ("flash", 64, False, True),
        ("flash", 36, False, True),  # padded
        ("efficient", 64, False, False),
        ("efficient", 64, True, False),  # 13 keys: the mask is padded
        ("math", 36, False, True),
        ("math", 36, True, True),
    ],
)
def test_every_kernel_has_an_output_and_gradients_of_the_right_shape(kernel, head, masked, grouped):
    with FakeTensorMode():
        q, k, v = tensors(BF16, head=head, kv_heads=2 if grouped else 4, keys=13)
        mask = torch.empty(2, 1, 16, 13, dtype=torch.bool) if masked else None
        out = attend(kernel, q, k, v, mask, 0.0, False, None, grouped)
        assert (out.shape, out.dtype) == ((2, 4, 16, head), BF16)
        out.sum().backward()
        assert [t.grad.shape for t in (q, k, v)] == [t.shape for t in (q, k, v)]
