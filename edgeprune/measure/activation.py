"""The experts' activations as llama.cpp computes them, and their slopes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
# Of the gate product (None where there is none) and the up product, [N, F] each.
Activation = Callable[[Floats | None, Floats], Floats]
# enum ggml_glu_op (ggml.h) of the activations whose slope is known here.
_REGLU, _GEGLU, _SWIGLU = 0, 1, 2
_OAI_ALPHA, _OAI_LIMIT = 1.702, 7.0


def _sigmoid(values: Floats) -> Floats:
    result: Floats = np.reciprocal(1 + np.exp(-np.clip(values, -80, 80)))
    return result


def _silu(gate: Floats | None, up: Floats) -> Floats:
    assert gate is not None
    return gate * _sigmoid(gate) * up


def _gelu(gate: Floats | None, up: Floats) -> Floats:
    assert gate is not None
    inner = np.float32(np.sqrt(2 / np.pi)) * (gate + np.float32(0.044715) * gate**3)
    result: Floats = np.float32(0.5) * gate * (1 + np.tanh(inner)) * up
    return result


def _relu(gate: Floats | None, up: Floats) -> Floats:
    assert gate is not None
    return np.maximum(gate, 0) * up


def _oai(gate: Floats | None, up: Floats) -> Floats:
    assert gate is not None
    low, bounded = np.minimum(gate, _OAI_LIMIT), np.clip(up, -_OAI_LIMIT, _OAI_LIMIT)
    return low * _sigmoid(np.float32(_OAI_ALPHA) * low) * (bounded + 1)


def _relu_squared(_: Floats | None, up: Floats) -> Floats:
    return np.square(np.maximum(up, 0))


GATED: dict[str, Activation] = {"silu": _silu, "gelu": _gelu, "relu": _relu, "swiglu_oai": _oai}
UNGATED: dict[str, Activation] = {"relu_squared": _relu_squared}


def glu_slopes(kind: int, gate: Floats) -> tuple[npt.NDArray[Any], npt.NDArray[Any]] | None:
    """Value and derivative of the activation at ``gate``; None for one that is not known here."""
    if kind == _SWIGLU:
        sigmoid = 1 / (1 + np.exp(-np.clip(gate, -80, 80)))
        return gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    if kind == _REGLU:
        positive = (gate > 0).astype(np.float32)
        return gate * positive, positive
    if kind == _GEGLU:  # the tanh form, as ggml computes it
        inner = np.float32(np.sqrt(2 / np.pi)) * (gate + 0.044715 * gate**3)
        tanh = np.tanh(inner)
        rate = np.float32(np.sqrt(2 / np.pi)) * (1 + 3 * 0.044715 * gate**2)
        return 0.5 * gate * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh**2) * rate
    return None
