"""One linear layer, and two MLP blocks, by size, tokens and dtype."""

import pytest

from benchmarks import matrix


@pytest.mark.parametrize(("size", "tokens", "dtype", "method"), matrix.shapes("layer"))
def test_layer(measured, size, tokens, dtype, method):
    measured(method, layer=size, tokens=tokens, dtype=dtype)


@pytest.mark.parametrize(("size", "tokens", "dtype", "method"), matrix.shapes("block"))
def test_block(measured, size, tokens, dtype, method):
    measured(method, block=size, tokens=tokens, dtype=dtype)
