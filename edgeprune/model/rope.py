"""The rotary embedding in GGUF: base frequency, scaling, and factors by frequency where a scaling needs them."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

from edgeprune.errors import BadFile, Unsupported
from edgeprune.model.converter import Rope
from edgeprune.model.gguf import Entry, make_entry
from edgeprune.model.values import Settings, lookup

# Settings of a scaled rotary embedding: those with a place in GGUF, and those that llama.cpp fixes.
_KEYS = {
    "factor": ("factor", "f32"),
    "original_max_position_embeddings": ("original_context_length", "u32"),
}
_FIXED = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
_SPOKEN_FOR = ("rope_type", "type", "rope_theta", *_KEYS)
_POSITIONS = 4  # time, height, width, and one that llama.cpp has beside them
_BY_FREQUENCY = ("llama3", "proportional")  # scalings that are a factor for each frequency
_STILL = 1e30
_LARGEST_BASE = 1e30  # a thousand million are published
# Further settings by kind of scaling. Those beside an alpha are leftovers that nothing reads.
_OWN = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "proportional": ("partial_rotary_factor",),
    "alpha": ("alpha", "mscale", "mscale_all_dim"),
}
FREQUENCIES = "rope_freqs.weight"
_OTHERS_GGUF = (
    "llama.cpp's graph does not compute it; a GGUF that someone else has made works, and is pruned against what "
    "llama.cpp computes, not against the original"
)


def _table(rope: Rope, config: Mapping[str, Any]) -> dict[str, Any]:
    found = lookup(config, rope.parameters) or {}
    if not isinstance(found, dict):
        raise _unusable(found)
    return found


def _unusable(found: Any) -> BadFile:
    return BadFile(f"config.json has unusable rotary embedding settings: {found!r}"[:200])


def _kind(table: Mapping[str, Any]) -> str:
    """The kind of scaling; Hunyuan's is called dynamic, but a fixed alpha makes it another base and nothing else."""
    kind = str(table.get("rope_type") or table.get("type") or "default")
    return "alpha" if kind == "dynamic" and table.get("alpha") else kind


def _base(settings: Settings, table: Mapping[str, Any]) -> float:
    """The base frequency; families differ in its default, so the checkpoint or the converter has to name it."""
    rope = settings.converter.rope
    base = table.get("rope_theta")
    base = lookup(settings.config, ("rope_theta",)) if base is None else base
    base = rope.base if base is None else base
    if base is None:
        raise BadFile("config.json names no rope_theta, the base of the rotary embedding")
    if not isinstance(base, int | float) or isinstance(base, bool) or not 0 < base <= _LARGEST_BASE:
        raise BadFile(f"config.json: rope_theta = {repr(base)[:60]} is no base of a rotary embedding")
    if _kind(table) != "alpha":
        return float(base)
    turned = settings.sizes["rotary"]
    grown: float = float(base) * float(table["alpha"]) ** (turned / (turned - 2))
    return grown


def _check(rope: Rope, kind: str, table: Mapping[str, Any]) -> None:
    """Refuse a scaling, or a setting of one, that llama.cpp does not compute."""
    own = _OWN.get(kind, ("mscale", "mscale_all_dim") if rope.log_multiplier else ())
    foreign = sorted(
        f"{key} = {value!r}"
        for key, value in table.items()
        if key not in (*_SPOKEN_FOR, *own, *rope.known) and value not in (None, _FIXED.get(key))
    )
    if kind not in rope.scaling or foreign:
        what = f"with {foreign[0]} " if foreign else ""
        raise Unsupported(f"rotary embedding scaling '{kind}' {what}is not supported"[:200], hint=_OTHERS_GGUF)


def _log_multiplier(table: Mapping[str, Any], prefix: str) -> list[Entry]:
    """DeepSeek's YaRN: the attention's scale grows with ``mscale_all_dim``, the rotation's with the quotient of both
    settings, which llama.cpp takes for one."""
    over, under = float(table.get("mscale") or 0), float(table.get("mscale_all_dim") or 0)
    # Without them the original leaves the attention's scale alone, which llama.cpp changes with any factor.
    if over != under or not under:
        raise Unsupported(
            f"rotary embedding scaling 'yarn' with mscale = {over} and mscale_all_dim = {under}", hint=_OTHERS_GGUF
        )
    # The tenth is llama.cpp's: it divides the value by 0.1 for these graphs.
    return [make_entry(f"{prefix}.scaling.yarn_log_multiplier", "f32", 0.1 * under)]


def _scaling(rope: Rope, kind: str, table: Mapping[str, Any], prefix: str) -> list[Entry]:
    _check(rope, kind, table)
    if kind in _OWN:
        return []  # it is all in a tensor, see rope_tensors, or in the base
    entries = [make_entry(f"{prefix}.scaling.type", "str", kind)]
    for key, (ours, form) in _KEYS.items():
        if table.get(key) is not None or key == "factor":
            entries.append(make_entry(f"{prefix}.scaling.{ours}", form, table[key]))
    return entries + (_log_multiplier(table, prefix) if rope.log_multiplier and kind == "yarn" else [])


def _sections(rope: Rope, table: Mapping[str, Any], prefix: str) -> list[Entry]:
    """Pairs of dimensions by kind of position; llama.cpp has four kinds."""
    if not rope.sections:
        return []
    sections = [int(pairs) for pairs in table.get("mrope_section") or rope.sections]
    return [make_entry(f"{prefix}.dimension_sections", "[i32]", (sections + [0] * _POSITIONS)[:_POSITIONS])]


def rope_entries(settings: Settings) -> list[Entry]:
    """Base frequency and scaling, from any of the places where they are kept.

    Raises:
        BadFile: settings that are missing or of the wrong kind.
        Unsupported: settings that llama.cpp does not compute.
    """
    rope, prefix = settings.converter.rope, f"{settings.converter.arch}.rope"
    if not rope.rotary:
        return []
    table = _table(rope, settings.config)
    kind = _kind(table)
    try:
        entries = [] if kind == "default" else _scaling(rope, kind, table, prefix)
        base = make_entry(f"{prefix}.freq_base", "f32", _base(settings, table))
        return [base, *_sections(rope, table, prefix), *entries]
    except (AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
        raise _unusable(table) from error


def rope_tensors(settings: Settings) -> dict[str, list[float]]:
    """Tensors of numbers by which frequencies are divided, by name in GGUF; a converter's size ``rotary`` says how
    many dimensions turn.

    Raises:
        BadFile: settings that are missing or of the wrong kind.
    """
    rope = settings.converter.rope
    table = _table(rope, settings.config) if rope.rotary else {}
    kind = _kind(table)
    if kind not in _BY_FREQUENCY or kind not in rope.scaling:
        return {}
    try:
        base, dimensions = _base(settings, table), settings.sizes["rotary"]
        if kind == "proportional":
            return {FREQUENCIES: _proportional_factors(table, dimensions)}
        return {FREQUENCIES: _llama3_factors(table, base, dimensions)}
    except (LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        raise _unusable(table) from error


def _proportional_factors(table: Mapping[str, Any], dimensions: int) -> list[float]:
    """Gemma 4's: the first frequencies of the whole width, the others so slow that they do not turn
    (transformers, ``modeling_rope_utils._compute_proportional_rope_parameters``)."""
    turning = int(float(table.get("partial_rotary_factor", 1.0)) * dimensions // 2)
    return [float(table.get("factor") or 1.0)] * turning + [_STILL] * (dimensions // 2 - turning)


def _llama3_factors(table: Mapping[str, Any], base: float, dimensions: int) -> list[float]:
    """Llama 3.1's scaling: long waves by ``factor``, short ones not at all, those between by degrees
    (transformers, ``modeling_rope_utils._compute_llama3_parameters``)."""
    factor, trained = float(table["factor"]), float(table["original_max_position_embeddings"])
    low, high = float(table["low_freq_factor"]), float(table["high_freq_factor"])
    factors = []
    for index in range(0, dimensions, 2):
        wave = 2 * math.pi * base ** (index / dimensions)
        if wave < trained / high:
            factors.append(1.0)
        elif wave > trained / low:
            factors.append(factor)
        else:
            smooth = (trained / wave - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors
