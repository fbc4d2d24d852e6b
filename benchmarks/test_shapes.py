"""One linear layer, and two MLP blocks, by size, tokens and dtype."""

import pytest

from benchmarks import matrix


@pytest.mark.parametrize(("layer", "tokens", "dtype", "method"), matrix.shapes("layer"))
def test_layer(measured, layer, tokens, dtype, method):
    measured(method, layer=layer, tokens=tokens, dtype=dtype)


@pytest.mark.parametrize(("block", "tokens", "dtype", "method"), matrix.shapes("block"))
def test_block(measured, block, tokens, dtype, method):
    measured(method, block=block, tokens=tokens, dtype=dtype)
