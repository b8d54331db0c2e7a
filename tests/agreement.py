"""Whether llama.cpp computes what transformers computes: the same tokens through both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.activations import GELUTanh

from edgeprune.measure import llama
from edgeprune.measure.launch import Launch
from edgeprune.measure.text import TextFile, windows

TEXT = """The lighthouse keeper counted the ships that passed before the storm: eleven on Monday, four on Tuesday,
none on Wednesday. He wrote the numbers in a green book and, because nobody ever asked for it, added what he had seen.
"Grey sails, low in the water," says the entry of the third of March; "the captain waved, or drowned."

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

Im Winter 1878 war der Hafen vier Wochen lang zugefroren. 港は静かだった。 Никто не пришёл.
{"name": "Ada", "items": [3, 14, 159], "open": true, "note": null}
1 + 2 = 3, 10 - 4 = 6 and 7 * 8 = 56, so the sum of all three results is 65, which is not a prime number.
"""
LENGTH, WINDOWS = 64, 4


def log_probabilities(gguf: Path, sequences: list[list[int]]) -> torch.Tensor:
    """llama.cpp's log-probabilities [tokens, vocabulary] with an F32 cache, one sequence after the other."""
    launch = Launch(context=LENGTH, batch=LENGTH, threads=1, kv_type="F32")
    with pytest.MonkeyPatch.context() as patch:
        # Flash attention rounds keys and values to F16, which transformers does not.
        patch.setattr(llama, "FLASH_ATTENTION_ON", 0)
        with llama.session(gguf, launch) as opened:
            rows = [torch.from_numpy(opened.run(tokens).copy()) for tokens in sequences]
    return torch.log_softmax(torch.cat(rows).double(), -1)


def token_windows(checkpoint: Path, folder: Path) -> torch.Tensor:
    """Tokens [sequences, length] of the text above, by the checkpoint's own tokenizer. ``folder``: for the text."""
    text = folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    files = [TextFile("t", str(text), "held_out")]
    chosen = windows(files, "held_out", LENGTH, LENGTH * WINDOWS, lambda part: tokenizer(part.text)["input_ids"])
    tokens = torch.tensor([window.tokens for window in chosen])
    assert tokens.shape == (WINDOWS, LENGTH)
    return tokens


class _TableGelu(torch.nn.Module):
    """GELU as llama.cpp takes it on a CPU, from a table of F16 (ggml, ``ggml_vec_gelu_f32``)."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        found = torch.nn.functional.gelu(values.half().float(), approximate="tanh").half().float()
        return torch.where(values.abs() < 10, found, values.clamp(min=0))


def transformers_log_probabilities(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """transformers' log-probabilities [tokens, vocabulary]; with llama.cpp's GELU, whose rounding costs 1e-6 nats,
    and 1e-4 where two experts are so close for a router that it turns them round."""
    for module in model.modules():
        if isinstance(getattr(module, "act_fn", None), GELUTanh):
            module.act_fn = _TableGelu()
    with torch.no_grad():
        return torch.log_softmax(model(tokens).logits.flatten(0, 1).double(), -1)


def divergence(expected: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
    """Mean KL divergence in nats per token, and share of positions with the same top token."""
    nats = (expected.exp() * (expected - found)).sum(-1).mean()
    return float(nats), float((expected.argmax(-1) == found.argmax(-1)).double().mean())
