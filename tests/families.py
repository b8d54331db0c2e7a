"""One toy model for every converter: the real transformers class with a literal configuration, as the Hub has it.

The README's table of families is made from what stands here: ``python tests/families.py README.md`` writes it anew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import toys

from edgeprune.model.converter import COMPUTED_OTHERWISE

if TYPE_CHECKING:
    import torch

EXPERTS, KEPT = 8, 4
SEED = 7  # of the weights
KEPT_ON_REQUEST = "blocks that predict further tokens with `--mtp keep`"


@dataclass(frozen=True)
class Family:
    """What is known of one family.

    Attributes:
        arch: llama.cpp's architecture string.
        examples: published models.
        literal: configuration values; those that all families share are in ``SHARED``.
        published: what stands in ``config.json`` on the Hub besides, or instead of, what ``save_pretrained`` writes.
        variants: further configurations, each as what differs from ``literal``.
        experts: configuration key with the number of experts.
        tokenizer: ``byte_level`` or ``sentencepiece``.
        auto: transformers' class that makes the model from the configuration.
        nested: table of the configuration that the language model has for itself, "" for none.
        beside: configuration values beside that table.
        model_type: of the toy's configuration, where it is not the family's name.
        single: published checkpoints have the experts one by one.
        center: what norm weights vary around; 0 where one is added to them.
        prepare: further weights of the toy, set before it is saved.
        note: for the README: what is left out or refused.
    """

    arch: str
    examples: tuple[str, ...]
    literal: Mapping[str, Any]
    published: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    experts: str = "num_experts"
    tokenizer: str = "byte_level"
    auto: str = "AutoModelForCausalLM"
    nested: str = ""
    beside: Mapping[str, Any] = field(default_factory=dict)
    model_type: str = ""
    single: bool = True
    center: float = 1.0
    prepare: Callable[[Any], None] | None = None
    note: str = ""


SHARED = {
    "vocab_size": toys.VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
_OLD_YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _rescaled(factors: Mapping[str, float]) -> Callable[[Path], None]:
    """Multiplies tensors of a checkpoint, by the end of their names."""

    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = folder / "model.safetensors"
        weights = load_file(path)
        for name, weight in weights.items():
            weight *= next((factor for end, factor in factors.items() if name.endswith(end)), 1.0)
        save_file(weights, path, {"format": "pt"})

    return change


_TIED = {"tied embeddings": {"tie_word_embeddings": True}}
_GRANITE = {
    "intermediate_size": 256,
    "num_local_experts": EXPERTS,
    # All of them other than one, and such that no stage drowns the others.
    "embedding_multiplier": 1.5,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.6,
    "logits_scaling": 0.8,
    "rope_parameters": ROPE,
}
_LINEAR = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 64,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "num_experts": EXPERTS,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 320,
}

_LATENT = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "n_routed_experts": EXPERTS,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "first_k_dense_replace": 1,
}
_GLM = {
    "num_hidden_layers": 3,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
FAMILIES: dict[str, Family] = {
    "qwen3_moe": Family(
        "qwen3moe",
        ("Qwen3-30B-A3B", "Qwen3-235B-A22B", "Qwen3-Coder-30B-A3B"),
        {
            "intermediate_size": 256,
            "moe_intermediate_size": 256,
            "head_dim": 64,
            "num_experts": EXPERTS,
            "norm_topk_prob": True,
            "rope_parameters": ROPE,
        },
    ),
    "mixtral": Family(
        "llama",
        ("Mixtral-8x7B", "Mixtral-8x22B"),
        {"intermediate_size": 256, "num_local_experts": EXPERTS, "sliding_window": None, "rope_parameters": ROPE},
        experts="num_local_experts",
        tokenizer="sentencepiece",
    ),
    "olmoe": Family(
        "olmoe",
        ("OLMoE-1B-7B",),
        {
            "intermediate_size": 256,
            "num_key_value_heads": 4,
            "num_experts": EXPERTS,
            "norm_topk_prob": False,
            "rope_parameters": ROPE,
        },
    ),
    "gemma4": Family(
        "gemma4",
        ("Gemma-4-26B-A4B",),
        {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 24,
            "head_dim": 64,
            "global_head_dim": 128,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "intermediate_size": 384,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": EXPERTS,
            "top_k_experts": 2,
            "moe_intermediate_size": 224,
            "final_logit_softcapping": 30.0,
            "pad_token_id": 0,
            "use_bidirectional_attention": "vision",
            "rope_parameters": {
                "sliding_attention": ROPE,
                "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
            },
        },
        auto="AutoModelForImageTextToText",
        nested="text_config",
        single=False,
        beside={
            "vision_config": {
                "num_hidden_layers": 1,
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "position_embedding_size": 16,
            },
            "audio_config": None,
        },
        variants={"one head of keys": {"num_key_value_heads": 1}},
        # The model multiplies embeddings with the root of the width, and divides what routers see by it.
        prepare=_rescaled({"embed_tokens.weight": 1 / 16, "router.proj.weight": 16}),
        note="text only; vision and audio are left out; compared with GELU in F16, as llama.cpp's CPU code has it",
    ),
    "granitemoe": Family(
        "granitemoe",
        ("Granite-3.1-3B-A800M", "Granite-3.1-1B-A400M", "PowerMoE-3B"),
        _GRANITE,
        experts="num_local_experts",
    ),
    "granitemoehybrid": Family(
        "granitehybrid",
        ("Granite-4.0-H-Small", "Granite-4.0-H-Tiny"),
        {
            **_GRANITE,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "shared_intermediate_size": 384,
            "mamba_n_heads": 8,
            "mamba_d_head": 64,
            "mamba_n_groups": 2,
            "mamba_d_state": 32,
            "position_embedding_type": None,
        },
        variants={"rotated positions": {"position_embedding_type": "rope"}},
        experts="num_local_experts",
    ),
    "lfm2_moe": Family(
        "lfm2moe",
        ("LFM2-8B-A1B", "LFM2-24B-A2B"),
        {
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "num_dense_layers": 1,
            "intermediate_size": 448,
            "moe_intermediate_size": 224,
            "num_experts": EXPERTS,
            "rope_parameters": ROPE,
        },
    ),
    "nemotron_h": Family(
        "nemotron_h_moe",
        ("Nemotron-3-Nano-30B-A3B", "Nemotron-3-Super-120B-A12B"),
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "head_dim": 64,
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": 232,
            "moe_shared_expert_intermediate_size": 464,
            "routed_scaling_factor": 2.5,
            "mamba_num_heads": 6,
            "mamba_head_dim": 64,
            "n_groups": 2,
            "ssm_state_size": 32,
        },
        variants={
            "experts in a narrower space": {"moe_latent_size": 128},
            "groups of experts": {"n_group": 4, "topk_group": 2, "norm_topk_prob": False},
        },
        experts="n_routed_experts",
        note=f"{KEPT_ON_REQUEST}; llama.cpp centres the last norm of theirs, the original does not",
    ),
    "qwen3_next": Family(
        "qwen3next",
        ("Qwen3-Next-80B-A3B", "Qwen3-Coder-Next"),
        {**_LINEAR, "intermediate_size": 256, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25}},
        variants={
            "as many value heads as key heads": {"linear_num_value_heads": 2},
            "YaRN": {"rope_parameters": {**YARN, "partial_rotary_factor": 0.25}},
            "linear scaling": {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.25}},
        },
        center=0.0,
        note=KEPT_ON_REQUEST,
    ),
    "qwen3_5_moe": Family(
        "qwen35moe",
        ("Qwen3.5-35B-A3B", "Qwen3.5-122B-A10B", "Qwen3.5-397B-A17B"),
        {
            **_LINEAR,
            "rope_parameters": {
                **ROPE,
                "partial_rotary_factor": 0.25,
                "mrope_interleaved": True,
                "mrope_section": [3, 3, 2],
            },
        },
        auto="AutoModelForImageTextToText",
        nested="text_config",
        beside={
            "vision_config": {
                "depth": 1,
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 256,
                "num_position_embeddings": 16,
            },
        },
        center=0.0,
        note=f"text only; vision is left out; {KEPT_ON_REQUEST}",
    ),
    "qwen2_moe": Family(
        "qwen2moe",
        ("Qwen1.5-MoE-A2.7B", "Qwen2-57B-A14B"),
        {
            "intermediate_size": 512,
            "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 512,
            "num_experts": EXPERTS,
            "norm_topk_prob": False,
            "rope_parameters": ROPE,
        },
        published={
            "rope_theta": 10000.0,
            "sliding_window": 32768,
            "max_window_layers": 21,
            "use_sliding_window": False,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-06,
            "decoder_sparse_step": 1,
        },
        variants={"without biases": {"qkv_bias": False}, **_TIED},
    ),
    "deepseek_v2": Family(
        "deepseek2",
        ("DeepSeek-V2-Lite", "DeepSeek-Coder-V2-Lite"),
        {
            **_LATENT,
            "n_shared_experts": 2,
            "q_lora_rank": None,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
        published={
            "rope_theta": 10000,
            "rope_scaling": {**_OLD_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
            "n_group": 1,
            "topk_group": 1,
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "moe_layer_freq": 1,
            "ep_size": 1,
            "aux_loss_alpha": 0.001,
            "seq_aux": True,
            "rms_norm_eps": 1e-06,
            "attention_bias": False,
            "hidden_act": "silu",
            "auto_map": {"AutoConfig": "c.DeepseekV2Config"},
        },
        variants={"a query in two steps": {"q_lora_rank": 96, "rope_parameters": ROPE}},
        experts="n_routed_experts",
        note="the large DeepSeek-V2 (`group_limited_greedy`) is refused: llama.cpp scores groups otherwise",
    ),
    "deepseek_v3": Family(
        "deepseek2",
        ("DeepSeek-V3", "DeepSeek-R1", "DeepSeek-V3.1", "Moonlight-16B-A3B"),
        {
            **_LATENT,
            "n_shared_experts": 1,
            "q_lora_rank": 96,
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        published={
            "rope_theta": 10000,
            "rope_scaling": {**_OLD_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "moe_layer_freq": 1,
            "ep_size": 1,
            "num_nextn_predict_layers": 1,
            "attention_bias": False,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-06,
        },
        variants={
            "without groups or scaling": {"n_group": 1, "topk_group": 1, "rope_parameters": ROPE},
            "all groups": {"n_group": 4, "topk_group": 4},
        },
        experts="n_routed_experts",
        note=f"{KEPT_ON_REQUEST}; Kimi-K2 (`beta_fast` 1) is refused: llama.cpp has the bounds of DeepSeek's YaRN",
    ),
    "glm4_moe": Family(
        "glm4moe",
        ("GLM-4.5-Air", "GLM-4.5", "GLM-4.6"),
        {
            **_GLM,
            "head_dim": 64,
            "attention_bias": True,
            "use_qk_norm": True,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
        },
        published={
            "rope_theta": 10000,
            "rope_scaling": None,
            "partial_rotary_factor": 0.5,
            "hidden_act": "silu",
            "num_nextn_predict_layers": 1,
            "norm_topk_prob": True,
            "rms_norm_eps": 1e-05,
        },
        variants={"without norms of query and key": {"use_qk_norm": False}},
        experts="n_routed_experts",
        note=KEPT_ON_REQUEST,
    ),
    "glm4_moe_lite": Family(
        "deepseek2",
        ("GLM-4.7-Flash",),
        {
            **{key: value for key, value in _LATENT.items() if key != "first_k_dense_replace"},
            "q_lora_rank": 96,
            "routed_scaling_factor": 1.8,
            "rope_parameters": ROPE,
        },
        published={
            "rope_theta": 10000,
            "rope_scaling": None,
            "partial_rotary_factor": 1.0,
            "topk_method": "noaux_tc",
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_nextn_predict_layers": 1,
            "attention_bias": False,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-05,
        },
        variants={
            "YaRN": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7, "partial_rotary_factor": 1.0}}
        },
        experts="n_routed_experts",
        note=KEPT_ON_REQUEST,
    ),
    "dots1": Family(
        "dots1",
        ("dots.llm1",),
        {
            **_GLM,
            "num_key_value_heads": 4,
            "n_shared_experts": 2,
            "norm_topk_prob": True,
            "sliding_window": None,
            "rope_parameters": ROPE,
        },
        published={
            "rope_theta": 10000,
            "rope_scaling": None,
            "scoring_func": "noaux_tc",
            "moe_layer_freq": 1,
            "use_sliding_window": False,
            "max_window_layers": 3,
            "attention_bias": False,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-06,
        },
        variants=_TIED,
        experts="n_routed_experts",
    ),
    "minimax_m2": Family(
        "minimax-m2",
        ("MiniMax-M2", "MiniMax-M2.1"),
        {
            "head_dim": 64,
            "intermediate_size": 256,
            "num_local_experts": EXPERTS,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
        },
        published={
            "rope_theta": 10000,
            "rotary_dim": 32,
            "attn_type_list": [1, 1],
            "qk_norm_type": "per_layer",
            "scoring_func": "sigmoid",
            "use_qk_norm": True,
            "use_routing_bias": True,
            "use_mtp": True,
            "num_mtp_modules": 3,
            "mtp_transformer_layers": 1,
            "shared_intermediate_size": 0,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-06,
        },
        variants=_TIED,
        experts="num_local_experts",
    ),
    "ernie4_5_moe": Family(
        "ernie4_5-moe",
        ("ERNIE-4.5-21B-A3B", "ERNIE-4.5-300B-A47B"),
        {
            "num_hidden_layers": 3,
            "intermediate_size": 512,
            "moe_intermediate_size": 256,
            "moe_num_experts": EXPERTS,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "rope_parameters": ROPE,
        },
        published={
            "rope_theta": 10000.0,
            "use_bias": False,
            "moe_layer_end_index": 2,
            "moe_layer_interval": 1,
            "moe_gate": "topk",
            "moe_use_aux_free": True,
            "moe_capacity": [64, 64, 64],
            "use_rmsnorm": True,
            "num_nextn_predict_layers": 1,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-05,
        },
        variants={
            **_TIED,
            "without shared experts": {"moe_num_shared_experts": 0},
        },
        experts="moe_num_experts",
        tokenizer="sentencepiece",
        note="blocks that predict further tokens are left out: llama.cpp has no graph for them",
    ),
    "hunyuan_v1_moe": Family(
        "hunyuan-moe",
        ("Hunyuan-A13B",),
        {
            "head_dim": 64,
            "intermediate_size": 256,
            "num_experts": EXPERTS,
            "moe_topk": 2,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0},
        },
        published={
            "rope_theta": 10000.0,
            "moe_topk": [2, 2],
            "moe_intermediate_size": [256, 256],
            "num_shared_expert": [1, 1],
            "use_cla": False,
            "cla_share_factor": 2,
            "use_mixed_mlp_moe": True,
            "norm_topk_prob": True,
            "use_qk_norm": True,
            "mlp_bias": False,
            "moe_layer_num_skipped": 0,
            "attention_head_dim": 64,
            "attention_bias": False,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "type": "dynamic",
                "alpha": 1000.0,
                "factor": 1.0,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
        variants={"without alpha": {"rope_parameters": ROPE}},
        note="the tokenizer may be `hy.tiktoken`",
    ),
    "gpt_oss": Family(
        "gpt-oss",
        ("gpt-oss-20b", "gpt-oss-120b"),
        {
            "head_dim": 64,
            "intermediate_size": 256,
            "num_local_experts": EXPERTS,
            "sliding_window": 32,
            "rope_parameters": {**YARN, "truncate": True},
        },
        published={
            "rope_theta": 10000,
            "rope_scaling": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
            "experts_per_token": 2,
            "initial_context_length": 32,
            "swiglu_limit": 7.0,
            "attention_bias": True,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_act": "silu",
            "rms_norm_eps": 1e-05,
        },
        variants=_TIED,
        single=False,
        experts="num_local_experts",
        note="MXFP4 experts are kept; llama.cpp rounds the bounds of YaRN's ramp, the original does not",
    ),
    "llama4": Family(
        "llama4",
        ("Llama-4-Scout", "Llama-4-Maverick"),
        {
            "num_hidden_layers": 4,
            "head_dim": 64,
            "intermediate_size": 256,
            "intermediate_size_mlp": 512,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "rope_parameters": {**_LLAMA3, "rope_theta": 10000.0},
        },
        published={
            "rope_theta": 10000.0,
            "rope_scaling": _LLAMA3,
            "attn_temperature_tuning": 4,
            "attn_scale": 0.1,
            "attention_chunk_size": 8192,
            "floor_scale": 8192,
            "no_rope_layers": [],
            "use_qk_norm": True,
            "for_llm_compressor": False,
            "attention_bias": False,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-05,
        },
        variants={"experts in every layer": {"interleave_moe_layer_step": 1, "rope_parameters": ROPE}},
        model_type="llama4_text",
        single=False,
        experts="num_local_experts",
        note="the part that sees is left out; experts of Maverick cannot be dropped, see `inspect`",
    ),
}


# Families that llama.cpp runs and computes otherwise: its architecture, and published models.
OTHERWISE = {"phimoe": ("phimoe", "Phi-3.5-MoE")}


def literal(name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The whole literal configuration of family ``name``."""
    family = FAMILIES[name]
    values = {**SHARED, **family.literal, **changes}
    return {family.nested: values, **family.beside, "tie_word_embeddings": False} if family.nested else values


def published_config(name: str) -> dict[str, Any]:
    """``config.json`` of the toy as it would stand on the Hub."""
    family = FAMILIES[name]
    config = {**literal(name, {}), "model_type": family.model_type or name, "torch_dtype": "bfloat16"}
    return {key: value for key, value in config.items() if key != "rope_parameters"} | dict(family.published)


def make_model(name: str, changes: Mapping[str, Any]) -> Any:
    """A model of transformers' own class for family ``name``, with the configuration as its class reads it."""
    import transformers

    config = transformers.AutoConfig.for_model(FAMILIES[name].model_type or name, **literal(name, changes))
    return getattr(transformers, FAMILIES[name].auto).from_config(config)


def make_checkpoint(
    name: str, folder: Path, changes: Mapping[str, Any] | None = None, *, dtype: str = "float32", **save: Any
) -> Path:
    """A checkpoint of family ``name`` in ``folder``.

    Args:
        changes: configuration values other than the family's literal ones.
        save: further arguments of ``save_pretrained``.
    """
    family = FAMILIES[name]
    model = make_model(name, changes or {})
    if family.tokenizer == "sentencepiece":
        toys.sentencepiece_tokenizer(folder)
    else:
        toys.byte_level_tokenizer(folder, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], toys.QWEN2_PATTERN)
    toys.save_model(model, folder, SEED, dtype, save, family.center)
    if family.prepare is not None:
        family.prepare(folder)
    return folder


def kept_experts(layers: int, groups: int = 1) -> dict[int, tuple[int, ...]]:
    """Which experts stay by layer: half of each group, other ones in every layer."""
    size = EXPERTS // groups
    chosen = {}
    for layer in range(layers):
        places = [(layer + 1 + 2 * step) % size for step in range(size // 2)]
        chosen[layer] = tuple(sorted(group * size + place for group in range(groups) for place in places))
    return chosen


def without_experts(name: str, model: Any, keep: Mapping[int, tuple[int, ...]], changes: Mapping[str, Any]) -> Any:
    """The transformers model with the experts in ``keep`` (by layer) and no others."""
    import torch

    small = make_model(name, {**changes, FAMILIES[name].experts: KEPT}).eval()
    whole, state = model.state_dict(), {}
    for key, target in small.state_dict().items():
        layer = next((int(part) for part in key.split(".") if part.isdigit()), -1)
        source: torch.Tensor = whole[key]
        axes = [axis for axis in range(source.dim()) if source.shape[axis] != target.shape[axis]]
        state[key] = source.index_select(axes[0], torch.tensor(keep[layer])) if axes else source
    small.load_state_dict(state)
    return small


def readme_table() -> str:
    """The table of families in the README."""
    rows = ["| `model_type` | llama.cpp | for instance | also checked with | remarks |", "|---|---|---|---|---|"]
    for name, family in sorted(FAMILIES.items()):
        examples, variants = ", ".join(family.examples), ", ".join(family.variants)
        rows.append(f"| `{name}` | `{family.arch}` | {examples} | {variants} | {family.note} |")
    for name, reason in COMPUTED_OTHERWISE.items():
        arch, examples = OTHERWISE[name]
        rows.append(
            f"| `{name}` | `{arch}` | {examples} | | refused, because llama.cpp computes it wrongly: {reason} |"
        )
    return "\n".join(rows) + "\n"


BEGIN, END = "<!-- families -->\n", "<!-- end of families -->\n"


def with_table(readme: str) -> str:
    """The text of a README with the table as it is now."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}{readme_table()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
