"""Checkpoints whose weights are stored in fewer bits: FP8 with scales, and MXFP4.

FP8 (E4M3) weights have a scale for the tensor, for each output, or for each block of 128 x 128 (DeepSeek-V3). MXFP4
weights (gpt-oss) are 4-bit floats (E2M1) in blocks of 32 with a power of two as their scale: GGUF's MXFP4 is the same
numbers in another order of nibbles, so they are moved there without loss (OCP Microscaling Formats, version 1.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeprune.errors import BadFile, Unsupported

if TYPE_CHECKING:
    import torch

FP8 = "F8_E4M3"
MXFP4 = "MXFP4"
MXFP4_NAN = 255  # the one scale that is no power of two
# Scales of activations belong to runtimes that quantise them too; weights are what they are without them.
ACTIVATION_SCALES = (".input_scale", ".activation_scale", ".k_scale", ".v_scale")
_FP8_SCALES = ("_scale_inv", "_scale")
_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK = 32
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Scaled:
    """A quantised tensor: ``FP8`` or ``MXFP4``, and the name of the tensor with its scales."""

    form: str
    scale: str


def find_scales(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Scaled]:
    """The quantised tensors among ``tensors`` (type and shape by name), those without scales left out."""
    found = {}
    for name, (kind, shape) in tensors.items():
        if kind == FP8:
            scale = next((name + ending for ending in _FP8_SCALES if name + ending in tensors), None)
            if scale is not None:
                found[name] = Scaled(FP8, scale)
        elif kind == "U8" and name.endswith(_BLOCKS) and len(shape) >= 3 and shape[-1] == _BLOCK // 2:
            scale = name.removesuffix(_BLOCKS) + _SCALES
            if tensors.get(scale) == ("U8", shape[:-1]):
                found[name] = Scaled(MXFP4, scale)
    return found


def decoded(scaled: Scaled, weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The weights as float32.

    Args:
        block: rows and columns that have an FP8 scale in common, when there is more than one per row.

    Raises:
        BadFile: as many scales as do not fit the weights.
        Unsupported: scales that are integers.
    """
    if scaled.form == MXFP4:
        return _mxfp4_values(weight, scale)
    if not scale.is_floating_point():
        raise Unsupported(f"{scaled.scale} has scales of the type {str(scale.dtype).removeprefix('torch.')}")
    return weight.float() * _spread(scale.float(), tuple(weight.shape), block, scaled.scale)


def _spread(scale: torch.Tensor, shape: tuple[int, ...], block: tuple[int, int], name: str) -> torch.Tensor:
    """FP8 scales in a shape that can be multiplied with weights of ``shape``."""
    if scale.numel() == 1:
        return scale.reshape(())
    *outer, rows, columns = shape
    blocks = (*outer, -(-rows // block[0]), -(-columns // block[1]))
    if tuple(scale.shape) == blocks:
        return scale.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
    by_row = (*outer, rows)
    if tuple(scale.shape) in (by_row, (*by_row, 1)):
        return scale.reshape(*by_row, 1)
    # Experts stored with their inputs as rows (Llama 4) have a scale for each output, which is a column.
    if outer and tuple(scale.shape) in ((*outer, 1, columns), (*outer, columns, 1)):
        return scale.reshape(*outer, 1, columns)
    if outer and scale.numel() == outer[0]:  # one for each expert
        return scale.reshape(outer[0], *(1 for _ in shape[1:]))
    raise BadFile(f"{name}: scales of the shape {list(scale.shape)} do not fit weights of the shape {list(shape)}")


def _mxfp4_values(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [..., rows, width] of ``blocks`` uint8 [..., rows, width / 32, 16] and ``scales`` uint8 [..., rows,
    width / 32]: the low half of a byte comes before the high one, and a scale of 127 is one."""
    import torch

    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    values = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], dim=-1)
    powers = torch.ldexp(torch.ones(scales.shape), scales.int() - 127)
    return (values.flatten(-2) * powers.unsqueeze(-1)).flatten(-2)


def mxfp4_rows(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The same numbers as ggml packs them, uint8 [..., rows, width / 32 * 17].

    ggml (``block_mxfp4``) has the scale first, then 16 bytes with weight i in the low half and weight i + 16 in the
    high half of byte i.
    """
    import torch

    nibbles = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    packed = nibbles[..., : _BLOCK // 2] | (nibbles[..., _BLOCK // 2 :] << 4)
    return torch.cat([scales.unsqueeze(-1), packed], dim=-1).flatten(-2)
