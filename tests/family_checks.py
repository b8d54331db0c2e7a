"""What is the same between a checkpoint, its copies and its GGUF."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from agreement import divergence
from families import FAMILIES

from edgeprune.model.convert import SOURCE_KEY
from edgeprune.model.gguf import GgufFile


def changes_of(name: str, case: str) -> Mapping[str, Any]:
    return FAMILIES[name].variants[case] if case else {}


def loaded(name: str, checkpoint: Path) -> Any:
    auto = getattr(transformers, FAMILIES[name].auto)
    return auto.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()


def assert_same(expected: torch.Tensor, found: torch.Tensor) -> None:
    spread = -(expected.exp() * expected).sum(-1).mean()
    assert 1.0 < spread < 0.85 * torch.log(torch.tensor(float(expected.shape[-1])))  # neither certain nor flat
    nats, same = divergence(expected, found)
    assert nats < 1e-5 and same == 1.0, (nats, same)


def assert_same_file(one: Path, two: Path, but: str = "") -> None:
    """The same tensors and metadata, but for the name, the digest of the checkpoint and the key ``but``."""
    first, second = GgufFile(one), GgufFile(two)
    assert list(first.tensors) == list(second.tensors)
    for tensor in first.tensors:
        assert np.array_equal(first.raw(tensor), second.raw(tensor)), tensor
    own = (SOURCE_KEY, "general.name", but)
    left, right = ({k: e.raw for k, e in file.entries.items() if k not in own} for file in (first, second))
    assert left == right


def copied(checkpoint: Path, folder: Path) -> Path:
    """A checkpoint whose small files may be changed; the weights are the same file."""
    folder.mkdir()
    for path in checkpoint.iterdir():
        (os.link if path.suffix == ".safetensors" else shutil.copyfile)(path, folder / path.name)
    return folder
