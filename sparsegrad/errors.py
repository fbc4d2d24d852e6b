"""The one exception of this package."""


class SparseGradError(ValueError):
    """Input that SparseGrad cannot work with; the model is as it was before the call."""
