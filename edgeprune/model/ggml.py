"""GGML tensor types: their exact sizes, and encoding and decoding through llama.cpp's own library.

The table needs no native code. ``encode`` and ``decode`` load llama.cpp's library into the calling
process; callers other than tests run in a child (``edgeprune.measure.child``), because an assert in
the library ends its process.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.errors import BadFile, Unsupported


@dataclass(frozen=True)
class GgmlType:
    """One tensor type of ggml (ggml.h, ``enum ggml_type``).

    Attributes:
        name: as printed by llama.cpp in upper case.
        id: number in files.
        block: weights per block; a row must be a multiple of it.
        block_bytes: bytes per block.
        needs_imatrix: encoding without an importance matrix aborts, or is refused by llama-quantize.
        largest: magnitude beyond which the scale of a block overflows; the encoder asserts or writes garbage then.
        encodable: the library can encode weights in it; for the others it ends its process.
    """

    name: str
    id: int
    block: int
    block_bytes: int
    needs_imatrix: bool = False
    largest: float = 6.0e4  # most block scales are F16
    encodable: bool = True

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    @property
    def is_float(self) -> bool:
        return self.block == 1

    @property
    def input_block(self) -> int:
        """Activations that llama.cpp's CPU kernels round together in a product with such a weight: Q8_K's 256 or
        Q8_0's 32; 0 where they are not quantised."""
        if self.is_float:
            return 0
        return 256 if self.block == 256 else 32

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of ``width`` weights; ``width`` must be a multiple of ``block``."""
        return width // self.block * self.block_bytes

    def feeds_back(self, width: int) -> bool:
        """Whether a row of ``width`` weights has blocks that can make good the errors of those before them."""
        return not self.is_float and width > self.block


_TABLE = (
    GgmlType("F32", 0, 1, 4, largest=3.4e38),
    GgmlType("F16", 1, 1, 2),
    GgmlType("Q4_0", 2, 32, 18),
    GgmlType("Q4_1", 3, 32, 20),
    GgmlType("Q5_0", 6, 32, 22),
    GgmlType("Q5_1", 7, 32, 24),
    GgmlType("Q8_0", 8, 32, 34),
    GgmlType("Q8_1", 9, 32, 36, encodable=False),
    GgmlType("Q2_K", 10, 256, 84),
    GgmlType("Q3_K", 11, 256, 110),
    GgmlType("Q4_K", 12, 256, 144),
    GgmlType("Q5_K", 13, 256, 176),
    GgmlType("Q6_K", 14, 256, 210),
    GgmlType("Q8_K", 15, 256, 292, encodable=False),
    GgmlType("IQ2_XXS", 16, 256, 66, needs_imatrix=True),
    GgmlType("IQ2_XS", 17, 256, 74, needs_imatrix=True),
    GgmlType("IQ3_XXS", 18, 256, 98, needs_imatrix=True),
    GgmlType("IQ1_S", 19, 256, 50, needs_imatrix=True),
    GgmlType("IQ4_NL", 20, 32, 18),
    GgmlType("IQ3_S", 21, 256, 110),
    GgmlType("IQ2_S", 22, 256, 82, needs_imatrix=True),
    GgmlType("IQ4_XS", 23, 256, 136),
    GgmlType("I8", 24, 1, 1, encodable=False),
    GgmlType("I16", 25, 1, 2, encodable=False),
    GgmlType("I32", 26, 1, 4, encodable=False),
    GgmlType("I64", 27, 1, 8, encodable=False),
    GgmlType("F64", 28, 1, 8, encodable=False),
    GgmlType("IQ1_M", 29, 256, 56, needs_imatrix=True),
    GgmlType("BF16", 30, 1, 2, largest=3.3e38),
    GgmlType("TQ1_0", 34, 256, 54),
    GgmlType("TQ2_0", 35, 256, 66),
    GgmlType("MXFP4", 39, 32, 17),
    GgmlType("NVFP4", 40, 64, 36, largest=2.6e3),
    GgmlType("Q1_0", 41, 128, 18),
    GgmlType("Q2_0", 42, 64, 18),
)
_UNCHECKED = ("Q8_1",)  # of activations; ggml takes it for no type of a file
BY_NAME = {entry.name: entry for entry in _TABLE}
BY_ID = {entry.id: entry for entry in _TABLE}

# Post-training types worth choosing from. Q1_0, Q2_0 and the TQ types are for models trained
# binary or ternary; Q4_1, Q5_1 and MXFP4 are no better than a neighbour of fewer bits here.
CHOICES = (
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "IQ4_NL",
    "Q4_0", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0",
)  # fmt: skip


def type_named(name: str) -> GgmlType:
    """The type called ``name``, in either case.

    Raises:
        Unsupported: there is none.
    """
    try:
        return BY_NAME[name.upper()]
    except KeyError:
        raise Unsupported(f"unknown GGML type {name}", hint=f"known: {', '.join(BY_NAME)}") from None


def tensor_bytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Exact bytes of a tensor; ``shape`` in ggml's order, row width first."""
    rows = 1
    for extent in shape[1:]:
        rows *= extent
    return BY_NAME[type_name].row_bytes(shape[0]) * rows


class _TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits`` (ggml.h)."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


@cache
def library() -> Any:
    """llama.cpp's library with the ggml functions declared.

    The handle is llama-cpp-python's own: opening ``libggml`` by name would load a second instance
    of it, with tables and registries of its own.
    """
    import llama_cpp.llama_cpp as binding

    handle = binding._lib
    handle.ggml_quantize_chunk.restype = ctypes.c_size_t
    handle.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    handle.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    handle.ggml_get_type_traits.argtypes = [ctypes.c_int]
    handle.ggml_validate_row_data.restype = ctypes.c_bool
    handle.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return handle


def native_block(kind: GgmlType) -> tuple[int, int]:
    """(weights, bytes) per block as the library itself says, to check the table against it."""
    traits = library().ggml_get_type_traits(kind.id).contents
    return int(traits.block), int(traits.block_bytes)


def decode(kind: GgmlType, raw: npt.NDArray[np.uint8], width: int) -> npt.NDArray[np.float32]:
    """Weights float32 [rows, width] of ``raw`` uint8 [rows * row_bytes]."""
    row_bytes = kind.row_bytes(width)
    rows = raw.size // row_bytes
    if kind.name == "F32":
        return raw.view(np.float32).reshape(rows, width)
    source = np.ascontiguousarray(raw)
    weights = np.empty((rows, width), np.float32)
    address = library().ggml_get_type_traits(kind.id).contents.to_float
    if not address:
        raise Unsupported(f"llama.cpp has no decoder for {kind.name}")
    _TO_FLOAT(address)(source.ctypes.data, weights.ctypes.data, weights.size)
    return weights


def check_weights(kind: GgmlType, weights: npt.NDArray[np.float32], name: str) -> None:
    """Refuse NaN, infinity and magnitudes whose block scale would overflow.

    Raises:
        BadFile: says which, and how many.
    """
    bad = ~np.isfinite(weights)
    if bad.any():
        raise BadFile(
            f"tensor {name} holds {int(bad.sum())} values that are NaN or infinite",
            hint="the checkpoint is damaged or overflowed when it was saved; get it again",
        )
    most = float(np.abs(weights).max(initial=0.0))
    if most > kind.largest:
        raise BadFile(f"tensor {name} holds weights up to {most:.3g}, beyond the range of {kind.name}")


def _checked_importance(imatrix: npt.NDArray[np.float32], width: int, name: str) -> npt.NDArray[np.float32]:
    """``imatrix`` contiguous; the library reads ``width`` numbers from it, whatever its length."""
    if imatrix.shape != (width,):
        raise BadFile(f"{name}: the importance matrix has the shape {imatrix.shape} for rows of {width} weights")
    if not np.isfinite(imatrix).all() or imatrix.min() < 0:
        raise BadFile(f"{name}: the importance matrix holds values that are negative, NaN or infinite")
    return np.ascontiguousarray(imatrix, np.float32)


def encode(
    kind: GgmlType, weights: npt.NDArray[np.float32], imatrix: npt.NDArray[np.float32] | None, name: str = ""
) -> npt.NDArray[np.uint8]:
    """``weights`` float32 [rows, width] in type ``kind``, as uint8 [rows, row_bytes].

    Args:
        imatrix: importance of each column, float32 [width] (mean squared input), or None.
        name: tensor name, for messages.

    Raises:
        BadFile: weights or importances that are not finite or too large, before; invalid blocks, after.
        Unsupported: the library cannot encode the type, the width is not a multiple of the block, or the
            type needs an imatrix.
    """
    rows, width = weights.shape
    if not kind.encodable:
        raise Unsupported(f"{name}: llama.cpp does not store weights as {kind.name}")
    if width % kind.block:
        raise Unsupported(f"{name}: rows of {width} weights do not divide into {kind.name} blocks of {kind.block}")
    check_weights(kind, weights, name)
    if imatrix is None and kind.needs_imatrix:
        raise Unsupported(f"{name}: {kind.name} needs an importance matrix")
    source = np.ascontiguousarray(weights, np.float32)
    importance = None if imatrix is None else _checked_importance(imatrix, width, name)
    encoded = np.empty((rows, kind.row_bytes(width)), np.uint8)
    library().ggml_quantize_chunk(
        kind.id,
        source.ctypes.data,
        encoded.ctypes.data,
        0,
        rows,
        width,
        None if importance is None else importance.ctypes.data,
    )
    if not is_sound(kind, encoded):
        raise BadFile(f"{name}: encoding to {kind.name} gave invalid blocks")
    return encoded


def is_sound(kind: GgmlType, raw: npt.NDArray[np.uint8]) -> bool:
    """Whether ``raw``, whole blocks of type ``kind``, holds no NaN and no infinity, as far as ggml tells."""
    return kind.name in _UNCHECKED or bool(library().ggml_validate_row_data(kind.id, raw.ctypes.data, raw.nbytes))
