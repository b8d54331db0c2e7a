"""Toy models made on the spot: real transformers classes at toy size, and random GGUFs of other architectures.

The checkpoints have tokenizers of the three kinds in use (Qwen2's and GPT-2's byte-level BPE, SentencePiece-style
BPE), trained here on the calibration text. Weights are random but not flat: routers choose all experts, and logits
spread over several nats, so that an error anywhere moves the output.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.measure.text import shipped_texts
from edgeprune.model import ggml
from edgeprune.model.gguf import DEFAULT_ALIGNMENT, Entry, TensorShape, align, header, make_entry

LAYERS, EXPERTS, USED, WIDTH, EXPERT_WIDTH = 2, 8, 2, 256, 256
VOCABULARY = 640
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{# naïve – 日本 #}{% if add_generation_prompt %}\n\t{% endif %}"
)
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE = "\u2581"
Maker = Callable[[str], Path]  # of the fixtures: a name to the file or folder made for it


def training_lines() -> list[str]:
    """Lines of the shipped text, every domain."""
    lines = []
    for text in shipped_texts():
        lines += Path(text.path).read_text(encoding="utf-8")[:40_000].splitlines(keepends=True)
    return lines


def byte_level_tokenizer(
    folder: Path, special: list[str], pattern: str | None, *, words_first: bool = False, first: str = ""
) -> None:
    """Byte-level BPE in ``folder``.

    Args:
        special: special tokens; the first one pads and the last one ends a text.
        pattern: the split rule, None for GPT-2's own.
        words_first: a word that is a token is taken before any merge, as Llama 3 does.
        first: the special token in front of every text, or "".
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(special) - 8,  # fewer tokens than embeddings, as in most checkpoints
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_lines(), trainer)
    tokenizer.model.ignore_merges = words_first
    # Behind the vocabulary, where Qwen has them too.
    tokenizer.add_special_tokens(special)
    if first:
        processor = processors.TemplateProcessing(
            f"{first} $A", f"{first} $A $B", [(first, tokenizer.token_to_id(first))]
        )
        tokenizer.post_processor = processor
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=first or None,
        eos_token=special[-1],
        pad_token=special[0],
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)


def sentencepiece_tokenizer(folder: Path) -> None:
    """SentencePiece-style BPE as transformers writes it for Llama and Mixtral.

    Merges are made the SentencePiece way, every split of a token into two tokens, ranked by the token's score: it is
    what llama.cpp does, and the merges that a BPE trainer leaves behind are fewer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    trained.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 3 - 256 - 2, limit_alphabet=110, show_progress=False)
    trained.train_from_iterator((line.rstrip("\n") for line in training_lines()), trainer)
    pieces = sorted(trained.get_vocab(), key=lambda piece: trained.get_vocab()[piece])
    joined = [piece for piece in pieces if len(piece) > 1] + [SPACE * 2, SPACE * 4]
    single = [piece for piece in pieces if len(piece) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *joined, *single]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in joined
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)


ROUTERS = ("gate.weight", "router.weight", "gate.wg.weight")


def spread(model: Any, seed: int, center: float = 1.0) -> None:
    """Random weights that keep every stage lively: norms near ``center``, logits of routers and tokens spread over
    nats, biases that matter."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    learned = ("correction_bias", "expert_bias", "layer_scalar")
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith(learned)]
    for name, parameter in [*model.named_parameters(), *buffers]:
        noise = torch.randn(parameter.shape, generator=generator)
        if "bias" in name or "sinks" in name:
            values = 0.2 * noise
        elif parameter.dim() == 1:
            # The norm of a linear attention multiplies with its weight also where the others add one to it.
            values = (1.0 if "linear_attn.norm" in name else center) + 0.2 * noise
        elif "embed_tokens" in name:
            # As small as an output matrix where they are one too: else each token is sure to follow itself.
            values = 2.0 * noise / parameter.shape[-1] ** 0.5 if tied else noise
        else:
            gain = 2.0 if (name.endswith(ROUTERS) or "lm_head" in name) else 1.0
            values = gain * noise / parameter.shape[-1] ** 0.5
        parameter.data.copy_(values)


def save_model(model: Any, folder: Path, seed: int, dtype: str, options: dict[str, Any], center: float = 1.0) -> Path:
    import torch

    spread(model, seed, center)
    model.to(getattr(torch, dtype)).save_pretrained(folder, **options)
    return folder


def _shape(changes: dict[str, Any]) -> dict[str, Any]:
    """Literal configuration values that all three families share."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_experts_per_tok": USED,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
        **changes,
    }


def qwen3_moe(folder: Path, *, seed: int = 1, dtype: str = "float32", save: Any = None, **changes: Any) -> Path:
    """A Qwen3-MoE checkpoint in ``folder``.

    Args:
        dtype: of the weights on disk.
        save: further arguments of ``save_pretrained``, such as ``max_shard_size``.
        changes: configuration values other than the toy's.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    literal = {
        "intermediate_size": WIDTH,
        "moe_intermediate_size": EXPERT_WIDTH,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": EXPERTS,
        "norm_topk_prob": True,
        "rope_theta": 10000.0,
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**_shape({**literal, **changes})))
    byte_level_tokenizer(folder, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], QWEN2_PATTERN)
    return save_model(model, folder, seed, dtype, save or {})


def mixtral(folder: Path, *, seed: int = 2, dtype: str = "float32", save: Any = None, **changes: Any) -> Path:
    """A Mixtral checkpoint in ``folder``; arguments as for ``qwen3_moe``."""
    from transformers import MixtralConfig, MixtralForCausalLM

    literal = {
        "intermediate_size": EXPERT_WIDTH,
        "num_key_value_heads": 2,
        "num_local_experts": EXPERTS,
        "sliding_window": None,
        "rope_theta": 1000000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = MixtralForCausalLM(MixtralConfig(**_shape({**literal, **changes})))
    sentencepiece_tokenizer(folder)
    return save_model(model, folder, seed, dtype, save or {})


def olmoe(folder: Path, *, seed: int = 3, dtype: str = "float32", save: Any = None, **changes: Any) -> Path:
    """An OLMoE checkpoint in ``folder``; arguments as for ``qwen3_moe``."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    literal = {
        "intermediate_size": EXPERT_WIDTH,
        "num_key_value_heads": 4,
        "num_experts": EXPERTS,
        "norm_topk_prob": False,
        "rope_theta": 10000.0,
    }
    model = OlmoeForCausalLM(OlmoeConfig(**_shape({**literal, **changes})))
    byte_level_tokenizer(folder, ["<|padding|>", "<|endoftext|>"], None)
    return save_model(model, folder, seed, dtype, save or {})


CHECKPOINTS: dict[str, Callable[..., Path]] = {"qwen3_moe": qwen3_moe, "mixtral": mixtral, "olmoe": olmoe}


# Synthetic GGUFs: no checkpoint, no transformers, any architecture that llama.cpp loads.

Shapes = dict[str, tuple[int, ...]]


def _attention(width: int) -> Shapes:
    return {
        "attn_norm.weight": (width,),
        "attn_q.weight": (width, width),
        "attn_k.weight": (width, width // 2),
        "attn_v.weight": (width, width // 2),
        "attn_output.weight": (width, width),
        "ffn_norm.weight": (width,),
    }


def _experts(width: int, expert_width: int, experts: int) -> Shapes:
    return {
        "ffn_gate_inp.weight": (width, experts),
        "ffn_gate_exps.weight": (width, expert_width, experts),
        "ffn_up_exps.weight": (width, expert_width, experts),
        "ffn_down_exps.weight": (expert_width, width, experts),
    }


def _feed_forward(width: int, hidden: int, suffix: str = "") -> Shapes:
    return {
        f"ffn_gate{suffix}.weight": (width, hidden),
        f"ffn_up{suffix}.weight": (width, hidden),
        f"ffn_down{suffix}.weight": (hidden, width),
    }


def _qwen3moe(width: int, hidden: int, experts: int, layer: int) -> Shapes:
    head = width // 4
    norms = {"attn_q_norm.weight": (head,), "attn_k_norm.weight": (head,)}
    return {**_attention(width), **norms, **_experts(width, hidden, experts)}


def _qwen2moe(width: int, hidden: int, experts: int, layer: int) -> Shapes:
    shared = {"ffn_gate_inp_shexp.weight": (width,), **_feed_forward(width, 2 * hidden, "_shexp")}
    return {**_attention(width), **_experts(width, hidden, experts), **shared}


def _deepseek2(width: int, hidden: int, experts: int, layer: int) -> Shapes:
    latent = {
        "attn_norm.weight": (width,),
        "attn_q_a_norm.weight": (96,),
        "attn_kv_a_norm.weight": (128,),
        "attn_q_a.weight": (width, 96),
        "attn_q_b.weight": (96, 4 * 96),
        "attn_kv_a_mqa.weight": (width, 128 + 32),
        "attn_k_b.weight": (64, 128, 4),
        "attn_v_b.weight": (128, 64, 4),
        "attn_output.weight": (4 * 64, width),
        "ffn_norm.weight": (width,),
    }
    if layer == 0:
        return {**latent, **_feed_forward(width, 2 * hidden)}
    bias = {"exp_probs_b.bias": (experts,)}
    return {**latent, **_experts(width, hidden, experts), **bias, **_feed_forward(width, hidden, "_shexp")}


def _gpt_oss(width: int, hidden: int, experts: int, layer: int) -> Shapes:
    attention = _attention(width)
    attention["post_attention_norm.weight"] = attention.pop("ffn_norm.weight")
    biases: Shapes = {
        "attn_output.bias": (width,),
        "attn_sinks.weight": (4,),
        "ffn_gate_inp.bias": (experts,),
        "ffn_gate_exps.bias": (hidden, experts),
        "ffn_up_exps.bias": (hidden, experts),
        "ffn_down_exps.bias": (width, experts),
    }
    return {**attention, **_experts(width, hidden, experts), **biases}


def _llama4(width: int, hidden: int, experts: int, layer: int) -> Shapes:
    return {**_attention(width), **_experts(width, hidden, experts), **_feed_forward(width, hidden, "_shexp")}


def _dense(width: int, hidden: int, experts: int, layer: int) -> Shapes:
    return {**_attention(width), **_feed_forward(width, hidden)}


_Extra = tuple[tuple[str, str, Any], ...]
SYNTHETIC: dict[str, tuple[Callable[[int, int, int, int], Shapes], _Extra]] = {
    "qwen3moe": (_qwen3moe, ()),
    "qwen2moe": (_qwen2moe, (("expert_shared_feed_forward_length", "u32", 2 * EXPERT_WIDTH),)),
    "deepseek2": (
        _deepseek2,
        (
            ("leading_dense_block_count", "u32", 1),
            ("expert_shared_count", "u32", 1),
            ("expert_gating_func", "u32", 2),
            ("expert_weights_norm", "bool", True),
            ("expert_weights_scale", "f32", 2.5),
            ("attention.q_lora_rank", "u32", 96),
            ("attention.kv_lora_rank", "u32", 128),
            ("attention.head_count_kv", "u32", 1),
            ("attention.key_length", "u32", 160),
            ("attention.value_length", "u32", 128),
            ("attention.key_length_mla", "u32", 96),
            ("attention.value_length_mla", "u32", 64),
            ("rope.dimension_count", "u32", 32),
        ),
    ),
    "gpt-oss": (_gpt_oss, (("attention.sliding_window", "u32", 128),)),
    "llama4": (
        _llama4,
        (("interleave_moe_layer_step", "u32", 1), ("attention.sliding_window", "u32", 8192)),
    ),
    "llama": (_dense, ()),  # without experts: a dense model
}


def _byte_vocabulary(size: int) -> list[Entry]:
    """A tokenizer of 256 byte tokens and an end-of-text token: every text is tokenized, nothing is merged."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = [*alphabet, "<|endoftext|>", *(f"[UNUSED{index}]" for index in range(257, size))]
    types = [1] * 256 + [3] + [5] * (size - 257)
    return [
        make_entry("tokenizer.ggml.model", "str", "gpt2"),
        make_entry("tokenizer.ggml.pre", "str", "gpt-2"),
        make_entry("tokenizer.ggml.tokens", "[str]", texts),
        make_entry("tokenizer.ggml.token_type", "[i32]", types),
        make_entry("tokenizer.ggml.merges", "[str]", []),
        make_entry("tokenizer.ggml.eos_token_id", "u32", 256),
    ]


def write_gguf(
    path: Path, entries: Iterable[Entry], tensors: Iterable[tuple[TensorShape, npt.NDArray[Any]]], alignment: int = 32
) -> Path:
    """A GGUF with ``tensors`` and the bytes of each."""
    pairs = list(tensors)
    data = header(entries, [shape for shape, _ in pairs], alignment)
    for shape, values in pairs:
        raw = values.tobytes()
        assert len(raw) == shape.nbytes
        data += raw + bytes(align(len(raw), alignment) - len(raw))
    path.write_bytes(data)
    return path


def _values(name: str, shape: tuple[int, ...], random: np.random.Generator) -> npt.NDArray[np.float32]:
    noise = random.standard_normal(tuple(reversed(shape)), np.float32)
    if "norm" in name:
        return np.float32(1) + np.float32(0.2) * noise
    if len(shape) == 1 or name.endswith(".bias"):
        return np.float32(0.2) * noise
    if name == "token_embd.weight":
        return noise
    gain = 2.0 if name in ("output.weight",) or "ffn_gate_inp." in name else 1.0
    return noise * np.float32(gain / shape[0] ** 0.5)


def synthetic_gguf(
    path: Path,
    arch: str = "qwen3moe",
    *,
    layers: int = LAYERS,
    experts: int = EXPERTS,
    used: int = USED,
    width: int = WIDTH,
    expert_width: int = EXPERT_WIDTH,
    vocabulary: int = 320,
    groups: int = 1,
    groups_used: int = 1,
    kind: str = "F32",
    tokenizer: str = "bytes",
    seed: int = 0,
    extra: Iterable[tuple[str, str, Any]] = (),
) -> Path:
    """A random GGUF of ``arch``, one of ``SYNTHETIC``, that llama.cpp loads and runs.

    Args:
        kind: GGML type of the matrices whose width its block divides; the others, norms and routers are F32.
        tokenizer: ``bytes``, or ``no_vocab`` for none.
        extra: further (key, type, value); a key without a dot in front of it gets the architecture's prefix.
    """
    describe, specific = SYNTHETIC[arch]
    if arch == "llama4":  # every fourth layer attends to everything, and llama.cpp needs one
        layers = max(layers, 4)
    moe = describe is not _dense
    values: dict[str, tuple[str, Any]] = {
        "block_count": ("u32", layers),
        "context_length": ("u32", 2048),
        "embedding_length": ("u32", width),
        "feed_forward_length": ("u32", 2 * expert_width if moe else expert_width),
        "attention.head_count": ("u32", 4),
        "attention.head_count_kv": ("u32", 2),
        "attention.layer_norm_rms_epsilon": ("f32", 1e-6),
        "rope.freq_base": ("f32", 10000.0),
        "vocab_size": ("u32", vocabulary),
    }
    if moe:
        values |= {
            "expert_count": ("u32", experts),
            "expert_used_count": ("u32", used),
            "expert_feed_forward_length": ("u32", expert_width),
        }
    if groups > 1:
        values |= {"expert_group_count": ("u32", groups), "expert_group_used_count": ("u32", groups_used)}
    values |= {key: (form, value) for key, form, value in specific}
    whole = {"general.architecture": ("str", arch), "general.name": ("str", f"toy {arch}")}
    whole |= {f"{arch}.{key}": value for key, value in values.items()}
    for key, form, value in extra:
        known = key.split(".")[0] in ("general", "tokenizer", "edgeprune", "split", arch)
        whole[key if known else f"{arch}.{key}"] = (form, value)
    entries = [make_entry(key, form, value) for key, (form, value) in whole.items()]
    entries += (
        _byte_vocabulary(vocabulary)
        if tokenizer == "bytes"
        else [make_entry("tokenizer.ggml.model", "str", tokenizer)]
    )
    shapes: Shapes = {"token_embd.weight": (width, vocabulary)}
    for layer in range(layers):
        own = describe(width, expert_width, experts, layer)
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in own.items()}
    shapes |= {"output_norm.weight": (width,), "output.weight": (width, vocabulary)}
    random = np.random.default_rng(seed)
    tensors = [_encoded(name, shape, kind, random) for name, shape in shapes.items()]
    return write_gguf(path, entries, tensors, DEFAULT_ALIGNMENT)


def _encoded(
    name: str, shape: tuple[int, ...], kind: str, random: np.random.Generator
) -> tuple[TensorShape, npt.NDArray[Any]]:
    weights = _values(name, shape, random)
    chosen = ggml.BY_NAME[kind]
    if len(shape) == 1 or "ffn_gate_inp" in name or name.endswith(".bias") or shape[0] % chosen.block:
        chosen = ggml.BY_NAME["F32"]
    if chosen.name == "F32":
        return TensorShape(name, shape, "F32"), weights
    importance = np.ones(shape[0], np.float32)
    rows = np.ascontiguousarray(weights.reshape(-1, shape[0]))
    return TensorShape(name, shape, chosen.name), ggml.encode(chosen, rows, importance, name)


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of the table in ``path``; a value of ``...`` removes the key."""
    table = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        if value is ...:
            table.pop(key, None)
        else:
            table[key] = value
    path.write_text(json.dumps(table), encoding="utf-8")
