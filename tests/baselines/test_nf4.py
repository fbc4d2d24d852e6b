"""NF4 with double quantization: its tables, its values by the definition, its bytes, and bitsandbytes where it is."""

import math
import statistics

import pytest
import torch

from baselines.dynamic8 import dynamic_table
from baselines.nf4 import (
    BLOCK,
    MAGNITUDES,
    Tables,
    dequantize,
    normal_float_table,
    quantize,
    stored_bytes,
)

# One entry, less and more than a block, odd numbers, more than 256 blocks, several parts.
SHAPES = [(1, 1), (3, 5), (8, 8), (5, 13), (1, 131), (33, 64), (129, 131)]
TABLES = Tables.made(torch.device("cpu"))


def made(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_table_is_the_papers():
    # Appendix E of the paper, as printed.
    printed = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    printed += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
    printed += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
    printed += [0.7229568362236023, 1.0]
    torch.testing.assert_close(normal_float_table(), torch.tensor(printed), rtol=0, atol=1e-6)


def test_the_table_is_made_of_quantiles():
    normal = statistics.NormalDist()
    outermost = (1 - 1 / 30 + 1 - 1 / 32) / 2
    largest = normal.inv_cdf(outermost)
    above = [normal.inv_cdf(outermost + (0.5 - outermost) * n / 8) / largest for n in range(8)]
    below = [-normal.inv_cdf(outermost + (0.5 - outermost) * n / 7) / largest for n in range(7)]
    expected = torch.tensor(sorted([*above, 0.0, *below]))
    torch.testing.assert_close(normal_float_table(), expected, rtol=1e-6, atol=0)


def test_the_dynamic_table_halves_its_steps_from_one_power_of_ten_to_the_next():
    table = dynamic_table()
    assert table.unique().numel() == 256
    assert (float(table.max()), int((table == 0).sum())) == (1.0, 1)
    positive = table[(table > 0) & (table < 1)]
    torch.testing.assert_close(positive, -table[table < 0].flip(0), rtol=0, atol=0)
    for bits in range(7):
        power = 10.0 ** (bits - 6)
        inside = positive[(positive > 0.1 * power) & (positive < power)]
        assert inside.numel() == 2**bits
        torch.testing.assert_close(inside.mean(), torch.tensor(0.55 * power), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_entry_is_the_nearest_value_of_its_block(shape, dtype):
    weight = made(shape, dtype)
    codes, magnitudes, scales, mean = quantize(weight, TABLES)
    entries, blocks = weight.numel(), math.ceil(weight.numel() / BLOCK)
    assert codes.shape == (math.ceil(entries / 2),)
    assert (magnitudes.shape, scales.shape) == ((blocks,), (math.ceil(blocks / MAGNITUDES),))
    held = sum(t.numel() * t.element_size() for t in (codes, magnitudes, scales, mean))
    assert held == stored_bytes(entries)

    flat = torch.zeros(blocks * BLOCK, dtype=torch.float64)
    flat[:entries] = weight.flatten().double()
    by_block = flat.view(blocks, BLOCK)
    largest = by_block.abs().amax(1)
    unpacked = torch.stack([codes >> 4, codes & 15], 1).flatten()[:entries].long()
    values = TABLES.normal.double()
    chosen = torch.zeros(blocks * BLOCK, dtype=torch.float64)
    chosen[:entries] = values[unpacked]
    off = (by_block / largest[:, None] - chosen.view(blocks, BLOCK)).abs()
    nearest = (by_block[..., None] / largest[:, None, None] - values).abs().amin(-1)
    # Where two values are as near, rounding to float32 decides.
    assert float((off - nearest).flatten()[:entries].max()) < 1e-6

    # The magnitudes alike, 256 of them at a time.
    rest = torch.zeros(scales.numel() * MAGNITUDES, dtype=torch.float64)
    rest[:blocks] = largest - largest.mean()
    rest = rest.view(-1, MAGNITUDES)
    assert float((scales.double() - rest.abs().amax(1)).abs().max()) <= 1e-6 * float(largest.max())
    stored = dynamic_table().double()[magnitudes.long()]
    scaled = (rest / rest.abs().amax(1, keepdim=True).clamp_min(1e-30)).flatten()[:blocks]
    least = (scaled[:, None] - dynamic_table().double()).abs().amin(-1)
    if blocks > 1:
        assert float(((scaled - stored).abs() - least).max()) < 1e-5

    # And back: the value, times the magnitude as it is stored.
    again = stored * scales.double().repeat_interleave(MAGNITUDES)[:blocks] + mean.double()
    expected = (chosen.view(blocks, BLOCK) * again[:, None]).flatten()[:entries].view(shape)
    found = dequantize((codes, magnitudes, scales, mean), TABLES, shape, torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    rounded = dequantize((codes, magnitudes, scales, mean), TABLES, shape, torch.bfloat16)
    assert torch.equal(rounded, found.float().bfloat16())


def test_zeros_stay_zeros():
    weight = made((4, 64))
    weight[1] = 0
    found = dequantize(quantize(weight, TABLES), TABLES, (4, 64), torch.float32)
    assert torch.equal(found[1], torch.zeros(64))
    nothing = torch.zeros(3, 50)
    assert torch.equal(dequantize(quantize(nothing, TABLES), TABLES, (3, 50), torch.float32), nothing)


def test_normal_weights_lose_less_than_on_a_uniform_grid():
    # Of 16 values over the same range, and with magnitudes that are not rounded: NF4 is made for these weights.
    weight = made((512, 512))
    error = (dequantize(quantize(weight, TABLES), TABLES, (512, 512), torch.float32) - weight).square().mean()
    by_block = weight.view(-1, BLOCK)
    largest = by_block.abs().amax(1, keepdim=True)
    grid = (by_block / largest * 7.5).add_(0.5).round_().sub_(0.5).clamp_(-7.5, 7.5) / 7.5 * largest
    assert float(error) < float((grid - by_block).square().mean())


@pytest.mark.parametrize("shape", [(64, 64), (256, 96), (300, 128)])
def test_bitsandbytes_stores_the_same(shape):
    functional = pytest.importorskip("bitsandbytes.functional", reason="the extra [bitsandbytes] is not installed")
    weight = made(shape)
    theirs, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
    codes, magnitudes, scales, mean = quantize(weight, TABLES)
    torch.testing.assert_close(state.code.float(), TABLES.normal, rtol=0, atol=1e-6)
    torch.testing.assert_close(state.state2.code, TABLES.dynamic, rtol=0, atol=1e-6)
    torch.testing.assert_close(state.offset, mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(state.state2.absmax, scales, rtol=1e-5, atol=0)
    # Where an entry lies half way between two values either may be taken.
    assert float((theirs.flatten() != codes).float().mean()) < 1e-3
    assert float((state.absmax != magnitudes).float().mean()) < 1e-2
