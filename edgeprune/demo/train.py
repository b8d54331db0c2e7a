"""Train the demo model: a small real Mixture-of-Experts language model.

Run as ``python -m edgeprune.demo.train --output DIR``; about an hour on two CPU cores. It needs
nothing but this package's dependencies: the text is the Python standard library of the running
interpreter (PSF licence), its sources as one kind of document and its documentation as another,
plus arithmetic and records generated here, so that experts have something to specialise on.

The modules in ``HELD_OUT_MODULES`` are never trained on; they measure the result.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import random
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

HELD_OUT_MODULES = ("argparse.py", "textwrap.py", "shelve.py", "heapq.py", "calendar.py")
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "turtledemo"}
SEQUENCE_TOKENS = 256
VOCABULARY = 2560
END_OF_TEXT = "<|endoftext|>"
# The Qwen2 pre-tokenizer rule, which llama.cpp knows by the name "qwen2".
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Schedule:
    """Length and shape of the training run; ``tokens`` counts all passes over the text."""

    tokens: int = 9_000_000
    batch_sequences: int = 16
    peak_rate: float = 2.5e-3
    warmup_steps: int = 60
    weight_decay: float = 0.05
    balance: float = 0.01


def source_documents(library: Path, *, held_out: bool) -> Iterator[str]:
    """Sources of the standard library below ``library``, one module a document."""
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIPPED_FOLDERS & set(relative.parts) or relative.name == "topics.py":
            continue
        if (str(relative) in HELD_OUT_MODULES) == held_out:
            yield path.read_text(encoding="utf-8", errors="ignore")


def documentation(library: Path) -> Iterator[str]:
    """Prose: the language reference that ships with pydoc, and the docstrings of the sources."""
    namespace = ast.parse((library / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    for node in ast.walk(namespace):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 400:
            yield node.value
    for source in source_documents(library, held_out=False):
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        strings = [
            text
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and (text := ast.get_docstring(node)) is not None
        ]
        if sum(map(len, strings)) > 400:
            yield "\n\n".join(strings)


def generated_documents(count: int, rng: random.Random) -> Iterator[str]:
    """Arithmetic and small records, two domains that the sources do not contain."""
    names = ["Ada", "Ben", "Carla", "Deniz", "Emre", "Farah", "Goro", "Hana", "Ivo", "Jana", "Kofi", "Lena"]
    names += ["Mika", "Nora", "Omar", "Pia"]
    things = ["apples", "books", "coins", "doors", "eggs", "files", "grapes", "hats", "jars", "keys"]
    things += ["lamps", "maps", "nails"]
    for index in range(count):
        lines = []
        for _ in range(24):
            a, b = rng.randint(2, 99), rng.randint(2, 99)
            if index % 2:
                record = {"name": rng.choice(names), "item": rng.choice(things), "count": a, "price": b / 4}
                lines.append(json.dumps(record))
            else:
                name, thing = rng.choice(names), rng.choice(things)
                lines.append(
                    f"{name} has {a} {thing} and gets {b} more. {a} + {b} = {a + b}, so {name} has {a + b} {thing}."
                )
        yield "\n".join(lines)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen2's pre-tokenizer rule."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def model_config() -> Qwen3MoeConfig:
    """Widths are multiples of 256, so that K- and IQ-quants apply to every matrix."""
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=2048,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        output_router_logits=True,
    )


def learning_rate(step: int, steps: int, schedule: Schedule) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    if step < schedule.warmup_steps:
        return schedule.peak_rate * (step + 1) / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    return schedule.peak_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """All documents as one int64 tensor [tokens], each closed by the end-of-text token."""
    ids: list[int] = []
    for encoded in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        ids.extend(encoded)
        ids.append(0)
    return torch.tensor(ids)


def unigram_perplexity(train: torch.Tensor, held_out: torch.Tensor) -> float:
    """Perplexity of the held-out tokens under the training text's token frequencies (+1)."""
    counts = torch.bincount(train, minlength=VOCABULARY).double() + 1
    return float(torch.exp(-(counts / counts.sum()).log()[held_out].mean()))


def held_out_perplexity(model: Qwen3MoeForCausalLM, held_out: torch.Tensor) -> float:
    """Perplexity over non-overlapping windows of ``SEQUENCE_TOKENS``."""
    windows = held_out[: len(held_out) // SEQUENCE_TOKENS * SEQUENCE_TOKENS].view(-1, SEQUENCE_TOKENS)
    losses = []
    model.eval()
    with torch.no_grad():
        for batch in torch.split(windows, 16):
            logits = model(input_ids=batch).logits[:, :-1].float()
            losses.append(
                torch.nn.functional.cross_entropy(
                    logits.reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1), reduction="none"
                )
            )
    model.train()
    return float(torch.cat(losses).mean().exp())


def train(model: Qwen3MoeForCausalLM, tokens: torch.Tensor, schedule: Schedule) -> None:
    """AdamW on random windows of ``tokens``, with the router's load-balancing loss."""
    steps = schedule.tokens // (schedule.batch_sequences * SEQUENCE_TOKENS)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    offsets = torch.arange(SEQUENCE_TOKENS + 1)
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, schedule)
        begin = torch.randint(len(tokens) - SEQUENCE_TOKENS - 1, (schedule.batch_sequences, 1))
        window = tokens[begin + offsets]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(input_ids=window[:, :-1])
        loss = torch.nn.functional.cross_entropy(
            output.logits.float().reshape(-1, VOCABULARY), window[:, 1:].reshape(-1)
        )
        (loss + schedule.balance * output.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            rate = (step + 1) * schedule.batch_sequences * SEQUENCE_TOKENS / (time.monotonic() - started)
            print(f"step {step}/{steps}  loss {float(loss.detach()):.3f}  {rate:,.0f} tokens/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the finished checkpoint")
    parser.add_argument("--tokens", type=int, default=Schedule.tokens, help="tokens to train on")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    library = Path(sysconfig.get_path("stdlib"))
    documents = [
        *source_documents(library, held_out=False),
        *documentation(library),
        *generated_documents(600, random.Random(0)),
    ]
    held_out_texts = list(source_documents(library, held_out=True))
    random.Random(0).shuffle(documents)
    tokenizer = train_tokenizer(documents[::2])
    tokens, held_out = (token_stream(tokenizer, texts) for texts in (documents, held_out_texts))
    model = Qwen3MoeForCausalLM(model_config())
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(tokens):,} training tokens, {len(held_out):,} held out, {parameters:,} parameters", flush=True)
    train(model, tokens, Schedule(tokens=arguments.tokens))
    model = model.to(torch.bfloat16)
    print(
        f"held-out perplexity {held_out_perplexity(model, held_out):.2f}, "
        f"unigram {unigram_perplexity(tokens, held_out):.2f}"
    )
    model.config.output_router_logits = False
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
