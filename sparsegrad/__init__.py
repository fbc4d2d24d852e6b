"""SparseGrad: selective fine-tuning of MLP layers in the basis of their gradients (EMNLP 2024, arXiv 2410.07383).

>>> layers = find_layers(model)                      # which linear layers, by kind
>>> bases = calibrate(model, layers, batches)        # streaming HOSVD of their gradients
>>> convert(model, layers, bases, density=0.01)      # in place; weight.grad is sparse from here on
>>> merge(model)                                     # back to plain linear layers
"""

from sparsegrad.adapted import AdaptedLinear, merge
from sparsegrad.basis import Ranks, StreamingHOSVD, TransitionMatrices, calibrate
from sparsegrad.convert import convert, load, load_optimizers, save
from sparsegrad.errors import SparseGradError
from sparsegrad.linear import SparseGradLinear
from sparsegrad.mlp import find_layers
from sparsegrad.optim import SparseAdam
from sparsegrad.products import dense_product, sparse_by_dense

__all__ = [
    "AdaptedLinear",
    "Ranks",
    "SparseAdam",
    "SparseGradError",
    "SparseGradLinear",
    "StreamingHOSVD",
    "TransitionMatrices",
    "calibrate",
    "convert",
    "dense_product",
    "find_layers",
    "load",
    "load_optimizers",
    "merge",
    "save",
    "sparse_by_dense",
]
