"""Deprecated: `open_vectors` is in `onnxsim_embed` itself. This module goes with the next release."""

import warnings

from onnxsim_embed.files.vector_directory import open_vectors

__all__ = ["open_vectors"]

warnings.warn(
    "onnxsim_embed.vector_store is deprecated: use `from onnxsim_embed import open_vectors`",
    DeprecationWarning,
    stacklevel=2,
)
