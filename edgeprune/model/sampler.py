"""How the authors of a checkpoint mean its next word to be drawn, as GGUF metadata.

llama-server goes by them unless it is told others (llama.cpp: common_init_sampler_from_model in common/common.cpp).
"""

from __future__ import annotations

from pathlib import Path

from edgeprune.model.gguf import Entry, make_entry
from edgeprune.model.tokenizer.special import optional_json

# The words of generation_config.json, llama.cpp's, and the types that it reads.
SAMPLERS = (
    ("temperature", "temp", "f32"),
    ("top_k", "top_k", "i32"),
    ("top_p", "top_p", "f32"),
    ("min_p", "min_p", "f32"),
    ("repetition_penalty", "penalty_repeat", "f32"),
)
_MOST = 1e6  # of any of them; a vocabulary has fewer tokens


def sampler_entries(folder: Path) -> list[Entry]:
    """Entries for what ``generation_config.json`` in ``folder`` says; none where it says that nothing is drawn.

    Numbers that no sampler has are left out.

    Raises:
        BadFile: it holds something else than a table.
    """
    told = optional_json(folder / "generation_config.json")
    if told.get("do_sample", True) is not True:
        return []
    entries = []
    for theirs, ours, kind in SAMPLERS:
        value = told.get(theirs)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if 0 <= value <= _MOST and (kind == "f32" or value == int(value)):
            number = float(value) if kind == "f32" else int(value)
            entries.append(make_entry(f"general.sampling.{ours}", kind, number))
    return entries
