"""Looking for damage in a file that computes nonsense."""

from __future__ import annotations

import numpy as np

from edgeprune.model.gguf import GgufFile

_FLOATS = {"F32": np.float32, "F16": np.float16}
_STEP = 1 << 24  # values looked at together


def first_not_finite(file: GgufFile) -> str:
    """Name of the first F32, F16 or BF16 tensor that holds NaN or infinity, or ""."""
    for info in file.tensors.values():
        raw = file.raw(info.name)
        for start in range(0, raw.size, 4 * _STEP):
            part = raw[start : start + 4 * _STEP]
            if info.type == "BF16":
                bad = bool(((part.view(np.uint16) & 0x7F80) == 0x7F80).any())
            elif info.type in _FLOATS:
                bad = not np.isfinite(part.view(_FLOATS[info.type])).all()
            else:
                bad = False
            if bad:
                return info.name
        file.release(info.name)
    return ""
