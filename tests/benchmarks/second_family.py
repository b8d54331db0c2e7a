"""Train a small Mixture-of-Experts model of another family than the demo's, to measure on.

Run as ``python tests/benchmarks/second_family.py OUTPUT [--tokens N]``; half an hour on two CPU cores. It is a
Qwen2-MoE: the router's coefficients are softmax over all experts and are not renormalised over the chosen ones, and
every layer has a shared expert. Text and tokenizer are those of the demo (``edgeprune.demo.train``).
"""

from __future__ import annotations

import argparse
import random
import sysconfig
from pathlib import Path

import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from edgeprune.demo.train import (
    VOCABULARY,
    Schedule,
    documentation,
    generated_documents,
    held_out_perplexity,
    source_documents,
    token_stream,
    train,
    train_tokenizer,
    unigram_perplexity,
)


def model_config() -> Qwen2MoeConfig:
    """About 12 M weights, of which a token meets a third."""
    return Qwen2MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=256,
        shared_expert_intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=2048,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        output_router_logits=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path, help="folder: model, and texts to calibrate and to measure with")
    parser.add_argument("--tokens", type=int, default=1_500_000, help="tokens to train on")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    library = Path(sysconfig.get_path("stdlib"))
    documents = [
        *source_documents(library, held_out=False),
        *documentation(library),
        *generated_documents(600, random.Random(0)),
    ]
    held_out_texts = [*source_documents(library, held_out=True), *generated_documents(40, random.Random(1))]
    random.Random(0).shuffle(documents)
    tokenizer = train_tokenizer(documents[::2])
    tokens, held_out = (token_stream(tokenizer, texts) for texts in (documents, held_out_texts))
    model = Qwen2MoeForCausalLM(model_config())
    print(f"{len(tokens):,} training tokens, {sum(p.numel() for p in model.parameters()):,} weights", flush=True)
    train(model, tokens, Schedule(tokens=arguments.tokens, peak_rate=2.5e-3))
    model = model.to(torch.bfloat16)
    found = held_out_perplexity(model, held_out)
    print(f"held-out perplexity {found:.2f}, unigram {unigram_perplexity(tokens, held_out):.2f}")
    model.config.output_router_logits = False
    arguments.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.output / "model")
    tokenizer.save_pretrained(arguments.output / "model")
    # Documents in the order in which they were shuffled: all kinds are in both texts.
    (arguments.output / "calibration.txt").write_text("\n\n".join(documents)[:400_000], encoding="utf-8")
    (arguments.output / "heldout.txt").write_text("\n\n".join(held_out_texts), encoding="utf-8")


if __name__ == "__main__":
    main()
