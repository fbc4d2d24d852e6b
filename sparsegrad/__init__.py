"""SparseGrad: selective fine-tuning of MLP layers in the basis of their gradients (EMNLP 2024, arXiv 2410.07383).

>>> layers = find_layers(model)                      # which linear layers, by kind
>>> bases = calibrate(model, layers, batches)        # streaming HOSVD of their gradients
>>> convert(model, layers, bases, density=0.01)      # in place; weight.grad is sparse from here on
>>> merge(model)                                     # back to plain linear layers

With less memory, the leading directions alone are trained, of frozen layers that need not keep their inputs:

>>> bases = calibrate(model, layers, batches, ranks={"up": Ranks(105, 256), "down": Ranks(420, 64)})
>>> convert_core(model, layers, bases)
"""

from sparsegrad.adapted import AdaptedLinear, merge
from sparsegrad.basis import Ranks, StreamingHOSVD, TransitionMatrices, calibrate
from sparsegrad.convert import convert, load, load_optimizers, save
from sparsegrad.core import CoreLinear, convert_core, core_shape
from sparsegrad.errors import SparseGradError
from sparsegrad.fixed import FixedLinear, choose_entries, convert_fixed, fixed_ranks
from sparsegrad.folded import FoldedLinear, convert_folded
from sparsegrad.linear import SparseGradLinear
from sparsegrad.mlp import find_layers
from sparsegrad.optim import SparseAdam, SparseSGD
from sparsegrad.products import dense_product, sparse_by_dense

__all__ = [
    "AdaptedLinear",
    "CoreLinear",
    "FixedLinear",
    "FoldedLinear",
    "Ranks",
    "SparseAdam",
    "SparseGradError",
    "SparseGradLinear",
    "SparseSGD",
    "StreamingHOSVD",
    "TransitionMatrices",
    "calibrate",
    "choose_entries",
    "convert",
    "convert_core",
    "convert_fixed",
    "convert_folded",
    "core_shape",
    "dense_product",
    "find_layers",
    "fixed_ranks",
    "load",
    "load_optimizers",
    "merge",
    "save",
    "sparse_by_dense",
]
