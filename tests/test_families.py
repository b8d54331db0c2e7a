"""Every family that has a converter: llama.cpp computes what transformers computes, whole and without experts."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import families
import numpy as np
import observed
import pytest
import torch
import toys
import transformers
from agreement import divergence, log_probabilities, token_windows, transformers_log_probabilities
from families import FAMILIES
from family_checks import assert_same, assert_same_file, copied, loaded
from observed import collected
from safetensors.torch import load_file, save_file

from edgeprune import inspection
from edgeprune.build import builder
from edgeprune.decide.plan import Plan, Prediction
from edgeprune.errors import EdgepruneError, Unsupported
from edgeprune.files import data_folder
from edgeprune.measure import child
from edgeprune.measure.launch import Launch
from edgeprune.measure.replay import LayerExperts, activation_of
from edgeprune.measure.routing import preference
from edgeprune.model.architecture import read_architecture
from edgeprune.model.checkpoint import SINGLE, Checkpoint, Stored, open_checkpoint
from edgeprune.model.convert import bare_header, convert
from edgeprune.model.converter import converter_for, load_converter, shipped_converters
from edgeprune.model.gguf import GgufFile
from edgeprune.model.planning import plan_conversion
from edgeprune.model.rope import FREQUENCIES

pytest_plugins = ("family_fixtures",)

CASES = [(name, "") for name in FAMILIES] + [(name, case) for name in FAMILIES for case in FAMILIES[name].variants]
CASE_NAMES = [f"{name}, {case}" if case else name for name, case in CASES]


@pytest.mark.parametrize(("name", "case"), CASES, ids=CASE_NAMES)
def test_llama_cpp_computes_what_transformers_computes(name: str, case: str, made: Any, tmp_path: Path) -> None:
    checkpoint, gguf = made(name, case)
    tokens = token_windows(checkpoint, tmp_path)
    expected = transformers_log_probabilities(loaded(name, checkpoint), tokens)
    assert_same(expected, log_probabilities(gguf, tokens.tolist()))


@pytest.mark.parametrize("name", FAMILIES)
def test_half_of_the_experts_compute_what_transformers_computes_with_them(
    name: str, made: Any, tmp_path: Path
) -> None:
    checkpoint, gguf = made(name)
    architecture = read_architecture(GgufFile(gguf))
    chosen = families.kept_experts(architecture.layers, architecture.groups)
    keep = {layer: chosen[layer] for layer in architecture.moe_layers}
    plan = Plan(
        arch=architecture.arch,
        experts=architecture.experts,
        kept=families.KEPT,
        keep=keep,
        types={},
        launch=Launch(),
        method="test",
        origin="user",
        predicted=Prediction(),
        made_from={"source": "toy"},
    )
    builder.build(str(gguf), plan.to_json(), str(tmp_path / "half.gguf"), "")
    model = families.without_experts(name, loaded(name, checkpoint), keep, {})
    model.set_attn_implementation("eager")
    tokens = token_windows(checkpoint, tmp_path)
    found = log_probabilities(tmp_path / "half.gguf", tokens.tolist())
    assert_same(transformers_log_probabilities(model, tokens), found)
    assert divergence(transformers_log_probabilities(loaded(name, checkpoint), tokens), found)[0] > 0.01


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].single])
def test_both_layouts_of_experts_give_the_same_file(name: str, made: Any, tmp_path: Path) -> None:
    """transformers keeps the experts of a layer in one tensor, published checkpoints mostly one by one."""
    checkpoint, gguf = made(name)
    other = families.make_checkpoint(name, tmp_path / name, save_original_format=False)
    names = set(open_checkpoint(other).stored)
    assert names != set(open_checkpoint(checkpoint).stored)
    convert(other, tmp_path / "other.gguf", "f32")
    assert_same_file(gguf, tmp_path / "other.gguf")


@pytest.mark.parametrize("name", FAMILIES)
def test_one_pass_sees_the_router_and_its_experts_can_be_replayed(name: str, made: Any, tmp_path: Path) -> None:
    _, gguf = made(name)
    file = GgufFile(gguf)
    architecture = read_architecture(file)
    collector = collected(gguf, observed.token_windows(architecture.vocabulary, 1), tmp_path)
    weights = {tensor.name for tensor in architecture.tensors if tensor.quantisable and tensor.role != "embedding"}
    assert weights <= set(collector.moments)
    everyone = np.ones(architecture.experts, bool)
    assert set(collector.layers()) == set(architecture.moe_layers)
    for layer, sums in collector.layers().items():
        assert sums.total("routed").sum() == observed.TOKENS * architecture.used
        if architecture.arch == "llama4":  # the coefficient is inside the expert, which cannot be replayed
            continue
        kept = collector.reservoirs()[layer]
        scores = preference(kept.selection, architecture.groups, architecture.groups_used, everyone)
        order = np.argsort(-scores, axis=1, kind="stable")[:, : architecture.used]
        np.testing.assert_array_equal(np.sort(order, axis=1), np.sort(kept.ids, axis=1))
        assert activation_of(LayerExperts(file, architecture, layer), kept) is not None


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].published])
def test_published_configuration_says_what_a_saved_one_says(name: str, made: Any, tmp_path: Path) -> None:
    checkpoint, gguf = made(name)
    folder = copied(checkpoint, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(families.published_config(name)))
    convert(folder, tmp_path / "model.gguf", "f32")
    # transformers saves no separator, which only a published configuration of Hunyuan names.
    assert_same_file(gguf, tmp_path / "model.gguf", but="tokenizer.ggml.seperator_token_id")


# By name of a published model: its config.json, billions of parameters, and the metadata that llama.cpp's own
# converter writes for it, but for what is a default, or is not looked at, in the family's graph.
PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))


def test_every_family_has_a_published_model() -> None:
    converters = {converter_for(model["config"]["model_type"]).name for model in PUBLISHED.values()}
    assert converters == set(FAMILIES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_model_in_its_real_size(name: str, tmp_path: Path) -> None:
    """Its configuration as published becomes the metadata that llama.cpp's own converter writes, and llama.cpp takes
    the header, with a hole in place of the weights."""
    table, billions, expected = (PUBLISHED[name][key] for key in ("config", "billions", "metadata"))
    family = FAMILIES[converter_for(table["model_type"]).name]
    config = transformers.AutoConfig.for_model(**table)
    with torch.device("meta"):
        model = getattr(transformers, family.auto).from_config(config)
    stored = {key: Stored(tuple(value.shape), "BF16") for key, value in model.state_dict().items()}
    checkpoint = Checkpoint(tmp_path, table, dict.fromkeys(stored, ""), stored)
    bare = bare_header(plan_conversion(checkpoint, "q8_0"), name, "config.json")
    path = tmp_path / "real.gguf"
    path.write_bytes(bare.top)
    with path.open("ab") as stream:
        stream.truncate(bare.nbytes)
    file = GgufFile(path)
    for key, value in expected.items():
        found = file.get(f"{family.arch}.{key}")
        same = found == value if isinstance(value, str) else np.allclose(found, value, rtol=1e-6, atol=0)
        assert same, (key, found, value)
    assert read_architecture(file).parameters / 1e9 == pytest.approx(billions, abs=0.05)
    arguments = {"shadow": str(path), "launch": Launch(context=512).to_json()}
    assert child.call("edgeprune.measure.benchmark:price", arguments)["kv_bytes"] > 0


# An output matrix with other numbers than the embeddings counts, whatever the configuration says of tying: its outer
# table, which transformers goes by, or that of the language model.

TYING = [
    ("qwen3_moe", True, None),
    ("nemotron_h", True, None),
    *((name, outer, inner) for name in ("gemma4", "qwen3_5_moe") for outer, inner in ((False, True), (True, ...))),
]


@pytest.mark.parametrize(("name", "outer", "inner"), TYING, ids=[f"{n}, {o}, {i}" for n, o, i in TYING])
def test_output_matrix_of_its_own_is_kept_as_transformers_does(
    name: str, outer: bool, inner: Any, made: Any, tmp_path: Path
) -> None:
    folder = copied(made(name)[0], tmp_path / "model")
    changes: dict[str, Any] = {"tie_word_embeddings": outer}
    if nested := FAMILIES[name].nested:
        table = json.loads((folder / "config.json").read_text())[nested]
        table = {**table, "tie_word_embeddings": inner}
        changes[nested] = {key: value for key, value in table.items() if value is not ...}
    toys.change_json(folder / "config.json", **changes)
    tokens = token_windows(folder, tmp_path)
    convert(folder, tmp_path / "model.gguf", "f32")
    expected = transformers_log_probabilities(loaded(name, folder), tokens)
    assert_same(expected, log_probabilities(tmp_path / "model.gguf", tokens.tolist()))


# What single families have of their own.

# As published. llama.cpp rounds the bounds of YaRN's ramp to whole dimensions.
GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}


def test_gpt_oss_differs_by_the_rounded_bounds_of_yarn_alone(tmp_path: Path) -> None:
    checkpoint = families.make_checkpoint("gpt_oss", tmp_path / "model", {"rope_parameters": GPT_OSS_ROPE})
    convert(checkpoint, tmp_path / "model.gguf", "f32")
    tokens = token_windows(checkpoint, tmp_path)
    found = log_probabilities(tmp_path / "model.gguf", tokens.tolist())
    exact = transformers_log_probabilities(loaded("gpt_oss", checkpoint), tokens)
    assert 1e-5 < divergence(exact, found)[0] < 5e-3
    toys.change_json(checkpoint / "config.json", rope_parameters={**GPT_OSS_ROPE, "truncate": True})
    assert_same(transformers_log_probabilities(loaded("gpt_oss", checkpoint), tokens), found)


def test_the_language_model_of_llama_4_is_the_same_without_the_part_that_sees(made: Any, tmp_path: Path) -> None:
    checkpoint, gguf = made("llama4")
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128,
        "image_size": 28, "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32,
        "projector_output_dim": 32,
    }  # fmt: skip
    text = {**families.literal("llama4", {}), "model_type": "llama4_text"}
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    whole = transformers.Llama4ForConditionalGeneration(config)
    whole.language_model.load_state_dict(loaded("llama4", checkpoint).state_dict())
    folder = Path(shutil.copytree(checkpoint, tmp_path / "whole", ignore=shutil.ignore_patterns("*.safetensors")))
    whole.save_pretrained(folder)
    (remark,) = convert(folder, tmp_path / "whole.gguf", "f32")
    assert remark.startswith("left out: the part that sees, 26 tensors")
    assert_same_file(gguf, tmp_path / "whole.gguf")


def test_experts_of_a_llama_4_may_be_stored_one_by_one(made: Any, tmp_path: Path) -> None:
    """As llm-compressor, which quantises linear layers, publishes them."""
    checkpoint, gguf = made("llama4")
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    weights = load_file(folder / SINGLE)
    for name in [name for name in weights if ".experts." in name]:
        before = name[: name.rindex(".")]
        for expert, stacked in enumerate(weights.pop(name)):
            own = zip(("gate", "up"), stacked.chunk(2, -1), strict=True) if "gate_up" in name else [("down", stacked)]
            for part, matrix in own:
                weights[f"{before}.{expert}.{part}_proj.weight"] = matrix.T.contiguous()
    save_file(weights, folder / SINGLE)
    convert(folder, tmp_path / "single.gguf", "f32")
    assert_same_file(gguf, tmp_path / "single.gguf")


# What a graph of llama.cpp does not compute is refused in one line, and what is no language model stays behind.

REFUSED: dict[str, list[tuple[dict[str, Any], str]]] = {
    "qwen2_moe": [({"norm_topk_prob": True}, "norm_topk_prob = True"), ({"mlp_only_layers": [1]}, "mlp_only_layers")],
    "deepseek_v2": [
        ({"topk_method": "group_limited_greedy"}, "topk_method = 'group_limited_greedy'"),
        ({"norm_topk_prob": True}, "norm_topk_prob = True"),
        ({"rope_parameters": {**families.YARN, "mscale": 1.0}}, "'yarn' with mscale = 1.0 and mscale_all_dim = 0.0"),
        ({"rope_parameters": families.LINEAR}, "scaling 'linear' is not supported"),
    ],
    "deepseek_v3": [
        ({"rope_parameters": families.YARN}, "'yarn' with mscale = 0.0 and mscale_all_dim = 0.0"),
        ({"rope_parameters": families.LINEAR}, "scaling 'linear' is not supported"),
        # Kimi-K2's, which llama.cpp's graph does not ask for: 0.19 nats per token on this toy model.
        (
            {"model_type": "kimi_k2", "rope_parameters": {**families.YARN, "beta_fast": 1.0}},
            "'yarn' with beta_fast = 1.0 is not supported",
        ),
        ({"rope_interleave": False}, "rope_interleave = False"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ({"attention_bias": True}, "attention_bias = True"),
    ],
    "glm4_moe": [({"topk_method": "greedy"}, "topk_method = 'greedy'")],
    "glm4_moe_lite": [
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": families.LINEAR}, "scaling 'linear' is not supported"),
    ],
    "dots1": [
        ({"num_key_value_heads": 2}, r"num_key_value_heads = 2; llama\.cpp's dots1 assumes 4"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types = "),
        ({"layer_types": ..., "sliding_window": 8, "max_window_layers": 1}, "sliding_window = 8"),
    ],
    "minimax_m2": [
        ({"qk_norm_type": "per_head"}, "qk_norm_type = 'per_head'"),
        ({"attn_type_list": [1, 0]}, r"attn_type_list = \[1, 0\]; llama\.cpp's minimax-m2 assumes \[1, 1\]"),
        ({"use_routing_bias": False}, "use_routing_bias = False"),
    ],
    "ernie4_5_moe": [({"use_bias": True}, "use_bias = True"), ({"moe_layer_interval": 2}, "moe_layer_interval = 2")],
    "hunyuan_v1_moe": [
        ({"use_cla": True}, "use_cla = True"),
        ({"num_shared_expert": [1, 2]}, r"num_shared_expert = \[1, 2\]"),
        ({"moe_topk": [2, 1]}, "moe_topk differs between layers"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "scaling 'dynamic' is not supported"),
    ],
    "gpt_oss": [
        ({"swiglu_limit": 5.0}, "swiglu_limit = 5.0"),
        ({"layer_types": ["full_attention", "full_attention"]}, "layer_types = "),
        ({"rope_parameters": {**families.YARN, "beta_fast": 8.0}}, "'yarn' with beta_fast = 8.0"),
    ],
    "llama4": [
        ({"attention_chunk_size": 4096}, "attention_chunk_size = 4096"),
        ({"use_qk_norm": False}, r"use_qk_norm = False; llama\.cpp's llama4 assumes True"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types = "),
        ({"no_rope_layers": [1, 1, 1, 1]}, r"no_rope_layers = \[1, 1, 1, 1\]"),
        ({"rope_parameters": families.YARN}, "scaling 'yarn' is not supported"),
    ],
}
CHANGES = [(name, changes, cause) for name, cases in REFUSED.items() for changes, cause in cases]


@pytest.mark.parametrize(("name", "changes", "cause"), CHANGES, ids=[f"{n}, {', '.join(c)}" for n, c, _ in CHANGES])
def test_configuration_that_the_graph_does_not_compute_is_refused(
    name: str, changes: dict[str, Any], cause: str, made: Any, tmp_path: Path
) -> None:
    folder = copied(made(name)[0], tmp_path / "model")
    toys.change_json(folder / "config.json", **changes)
    with pytest.raises(Unsupported, match=cause) as refusal:
        convert(folder, tmp_path / "model.gguf")
    assert "\n" not in refusal.value.cause and not (tmp_path / "model.gguf").exists()


def test_experts_of_a_llama_4_with_128_of_them_stay(tmp_path: Path) -> None:
    """llama.cpp goes by this number when it decides whether queries and keys are normalised."""
    path = toys.synthetic_gguf(tmp_path / "maverick.gguf", "llama4", experts=128, used=1, expert_width=32)
    assert "128" in read_architecture(GgufFile(path)).obstacle
    path = toys.synthetic_gguf(tmp_path / "scout.gguf", "llama4", experts=16, used=1, expert_width=32)
    assert not read_architecture(GgufFile(path)).obstacle


# The words of configurations that are older than the installed transformers, in which most checkpoints are published.
OLDER: dict[str, tuple[str, dict[str, Any]]] = {
    "granitemoehybrid": (
        "",
        {
            "layer_types": ["mamba", "attention", "mamba"],
            "position_embedding_type": "nope",
            "time_step_limit": ...,
            "rope_parameters": ...,
            "rope_theta": 10000,
            "rope_scaling": None,
        },
    ),
    "lfm2_moe": ("", {"tie_word_embeddings": ..., "tie_embedding": False, "rope_parameters": ..., "rope_theta": 1e4}),
    "nemotron_h": (
        "",
        {
            "layers_block_type": ...,
            "hybrid_override_pattern": "ME*E",
            "num_hidden_layers": 4,
            "time_step_limit": [0.0, float("inf")],
            "mtp_hybrid_override_pattern": "*E",
        },
    ),
    "qwen3_next": (
        "",
        {
            "layer_types": ...,
            "full_attention_interval": 2,
            "rope_parameters": ...,
            "rope_theta": 1e4,
            "rope_scaling": None,
            "partial_rotary_factor": 0.25,
        },
    ),
    "qwen3_5_moe": ("text_config", {"layer_types": ..., "full_attention_interval": 2}),
    "gemma4": (
        "text_config",
        {"per_layer_config": ..., "global_head_dim": 128, "num_global_key_value_heads": 1},
    ),
}


@pytest.mark.parametrize("name", OLDER)
def test_configuration_of_an_older_transformers_says_the_same(name: str, made: Any, tmp_path: Path) -> None:
    checkpoint, gguf = made(name)
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    table, changes = OLDER[name]
    path = folder / "config.json"
    if table:
        inner = {**json.loads(path.read_text())[table], **changes}
        changes = {table: {key: value for key, value in inner.items() if value is not ...}}
    toys.change_json(path, **changes)
    convert(folder, tmp_path / "older.gguf", "f32")
    assert_same_file(gguf, tmp_path / "older.gguf")


# Settings that would be computed otherwise, by family.
FOREIGN: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "a state that grows with another factor": ("granitemoehybrid", "", {"mamba_expand": 3}, "mamba_expand = 3"),
    "a bounded time step": ("granitemoehybrid", "", {"time_step_limit": [0.0, 1.0]}, "time_step_limit"),
    "a convolution without a bias": ("nemotron_h", "", {"use_conv_bias": False}, "use_conv_bias = False"),
    "a dense block": (
        "nemotron_h",
        "",
        {"layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"]},
        "20 tensors that nemotron_h does not",
    ),
    "another kind of position": (
        "granitemoehybrid",
        "",
        {"position_embedding_type": "alibi"},
        "position_embedding_type = 'alibi' has no place in llama.cpp",
    ),
    "a table for a word": (
        "granitemoehybrid",
        "",
        {"position_embedding_type": {"rope": 1}},
        r"type = \{'rope': 1\} has",
    ),
    "routing without a bias": ("lfm2_moe", "", {"use_expert_bias": False}, "use_expert_bias = False"),
    "scaled weights of experts": ("lfm2_moe", "", {"routed_scaling_factor": 2.0}, "routed_scaling_factor = 2.0"),
    "two widths of linear attention": (
        "qwen3_next",
        "",
        {"linear_key_head_dim": 16},
        "linear_value_head_dim = 32; .* assumes 16",
    ),
    "dense layers between": ("qwen3_next", "", {"mlp_only_layers": [1]}, r"mlp_only_layers = \[1\]"),
    "embeddings by layer": ("gemma4", "text_config", {"hidden_size_per_layer_input": 64}, "per_layer_input = 64"),
    "attention to what comes": (
        "gemma4",
        "text_config",
        {"use_bidirectional_attention": "all"},
        "use_bidirectional_attention = 'all'",
    ),
    "values of their own": ("gemma4", "text_config", {"attention_k_eq_v": False}, "attention_k_eq_v = False"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_setting_that_llama_cpp_computes_otherwise_is_refused(case: str, made: Any, tmp_path: Path) -> None:
    name, table, changes, cause = FOREIGN[case]
    folder = Path(shutil.copytree(made(name)[0], tmp_path / "model"))
    path = folder / "config.json"
    toys.change_json(path, **({table: {**json.loads(path.read_text())[table], **changes}} if table else changes))
    with pytest.raises(EdgepruneError, match=cause) as refusal:
        convert(folder, tmp_path / "model.gguf", "f32")
    assert "\n" not in refusal.value.cause and not (tmp_path / "model.gguf").exists()


# Converters are data; each must be complete.


def converter_file(name: str) -> Path:
    return data_folder("converters") / f"{name}.toml"


@pytest.mark.parametrize("name", FAMILIES)
def test_inspect_knows_of_a_checkpoint_what_its_gguf_says(name: str, made: Any) -> None:
    checkpoint, gguf = made(name)
    whole = read_architecture(GgufFile(gguf))
    sketch = inspection._sketch(open_checkpoint(checkpoint), load_converter(converter_file(name)))
    for field in ("arch", "layers", "experts", "used", "groups", "groups_used"):
        assert getattr(sketch, field) == getattr(whole, field), field
    assert sketch.allowed_counts() == whole.allowed_counts()
    assert sketch.nbytes == pytest.approx(whole.nbytes, rel=0.02)


def test_the_readme_shows_the_families_as_they_are() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert readme == families.with_table(readme), "run `python tests/families.py README.md`"


def test_every_converter_has_a_toy_model() -> None:
    assert {path.stem for path in shipped_converters()} == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_converter_accounts_for_every_tensor_of_its_model(name: str, made: Any) -> None:
    checkpoint, gguf = made(name)
    converter = load_converter(converter_file(name))
    patterns = [pattern for group in converter.left_out.values() for pattern in group]
    stored = [
        tensor
        for key, tensor in open_checkpoint(checkpoint).stored.items()
        if not any(fnmatch(key, pattern) for pattern in patterns)
    ]
    file = GgufFile(gguf)
    written = sum(np.prod(tensor.shape) for tensor in file.tensors.values() if tensor.name != FREQUENCIES)
    assert written == sum(np.prod(tensor.shape) for tensor in stored)
    assert converter.arch == FAMILIES[name].arch == file.get("general.architecture")
    required = {f"{converter.arch}.{key}" for key, field in converter.metadata.items() if not field.optional}
    assert required <= set(file.entries)
