"""Options of an encode call, validated once and carried through every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict, get_args

import numpy as np
import numpy.typing as npt

from onnxsim_embed.artifact.manifest import MODEL_FILES
from onnxsim_embed.system.arrays import Float32
from onnxsim_embed.system.units import check_integer

if TYPE_CHECKING:
    from onnxsim_embed.system.onnx_session import Device  # imports onnxruntime

OutputValue = Literal["sentence_embedding", "token_embeddings"]
LongTexts = Literal["truncate", "mean"]
OutputPrecision = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]

# Output dtypes that map the quantization range of each dimension to 256 steps.
RANGED = ("int8", "uint8")


class EncodeArguments(TypedDict, total=False):
    """Keyword-only arguments of the encode methods; see `Embedder.encode`."""

    precision: OutputPrecision
    ranges: npt.ArrayLike | None
    normalize_embeddings: bool | None
    truncate_dim: int | None
    long_texts: LongTexts
    stride: int


class ResultArguments(EncodeArguments, total=False):
    """Further arguments of the encode methods of `Embedder` that return one result."""

    batch_size: int | None
    show_progress_bar: bool | None
    output_value: OutputValue
    convert_to_numpy: bool
    convert_to_tensor: bool
    device: str | None


class LoadArguments(TypedDict, total=False):
    """Keyword-only arguments of `Embedder`."""

    precision: str
    device: Device
    engine: str
    threads: int | None
    pooling: str | None
    revision: str | None
    token: str | bool | None
    local_files_only: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodeOptions:
    """Options of an encode call; for their meaning see `Embedder.encode`.

    What depends on the model (the prompt's name, the dimensions) is checked where the model is known.

    :raises TypeError: for a prompt that is not a string.
    :raises ValueError: for another invalid value.
    """

    prompt_name: str | None = None
    prompt: str | None = None
    batch_size: int | None = None
    output_value: OutputValue = "sentence_embedding"
    precision: OutputPrecision = "float32"
    ranges: npt.ArrayLike | None = None
    normalize_embeddings: bool | None = None
    truncate_dim: int | None = None
    long_texts: LongTexts = "truncate"
    stride: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_name", "prompt"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name} must be a string or None, got {type(value).__name__}")
        check_positive("batch_size", self.batch_size)
        check_positive("truncate_dim", self.truncate_dim)
        for name, allowed in (
            ("output_value", OutputValue),
            ("precision", OutputPrecision),
            ("long_texts", LongTexts),
        ):
            value, known = getattr(self, name), get_args(allowed)
            if value not in known:
                message = f"{name} {value!r} is not one of {', '.join(known)}"
                if name == "precision" and value in (*MODEL_FILES, "bf16"):
                    message += (
                        f"; {value} is a weight precision: Embedder(..., precision={value!r})"
                    )
                raise ValueError(message)
        check_integer("stride", self.stride, 0)
        if self.long_texts != "mean" and self.stride:
            raise ValueError(f"stride applies to long_texts='mean' only, got {self.long_texts!r}")
        if self.long_texts == "mean" and self.output_value == "token_embeddings":
            raise ValueError("long_texts='mean' has no token embeddings; pass 'truncate'")
        if self.ranges is not None:
            if self.precision not in RANGED:
                raise ValueError(
                    f"ranges apply to precision {' and '.join(RANGED)} only, got {self.precision!r}"
                )
            object.__setattr__(self, "ranges", check_ranges(self.ranges))


def check_positive(name: str, value: int | None) -> None:
    """Raise ValueError unless the value is a positive integer or None."""
    if value is not None:
        check_integer(name, value)


def check_ranges(ranges: npt.ArrayLike, dim: int | None = None) -> Float32:
    """Return minima and maxima of each dimension as a float32 array (2, dim).

    :raises ValueError: for another shape, NaN, infinity, or a minimum above its maximum.
    """
    array = np.array(ranges, np.float32)
    if array.ndim != 2 or len(array) != 2 or (dim is not None and array.shape[1] != dim):
        expected = "dim" if dim is None else dim
        raise ValueError(f"ranges must have shape (2, {expected}), got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("ranges must be finite, got NaN or infinity")
    if (wrong := np.flatnonzero(array[0] > array[1])).size:
        raise ValueError(
            f"ranges must hold minima, then maxima: the minimum of dimension {wrong[0]} exceeds "
            "its maximum"
        )
    return array
