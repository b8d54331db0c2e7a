"""Blocks that predict further tokens: left out of checkpoints, or kept, and then they draft what they ought to."""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import llama_cpp.llama_cpp as binding
import numpy as np
import pytest
import torch
import toys
from agreement import LENGTH, divergence, log_probabilities, token_windows
from families import FAMILIES
from family_checks import assert_same, assert_same_file, copied, loaded
from safetensors.torch import load_file, save_file

from edgeprune.build import builder
from edgeprune.decide.plan import Plan, Prediction
from edgeprune.errors import BadFile, Unsupported
from edgeprune.measure.launch import Launch
from edgeprune.measure.llama import Log
from edgeprune.model.architecture import read_architecture
from edgeprune.model.checkpoint import SINGLE, open_checkpoint
from edgeprune.model.convert import convert
from edgeprune.model.gguf import GgufFile
from edgeprune.stages.converting import require_convertible

pytest_plugins = ("family_fixtures",)


@dataclass(frozen=True)
class Further:
    """Such a block of one family.

    Attributes:
        parts: what its names begin with, by what those of the layers begin with that it is made like.
        own: names of what it has beside: the fusion, the norms of embedding and state, and the last norm.
        count: configuration key with the number of blocks, "" for none.
        absent: keys that transformers saves and published configurations do not have.
        embedding: name of its own embeddings, "" for none.
    """

    parts: Mapping[str, str]
    own: tuple[str, str, str, str]
    count: str = "num_nextn_predict_layers"
    absent: tuple[str, ...] = ("num_mtp_layers",)
    embedding: str = ""


_QWEN = ("mtp.fc", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm")
_BEHIND = Further(
    {"model.layers.2.": "model.layers.3."},
    tuple(f"model.layers.3.{name}" for name in ("eh_proj", "enorm", "hnorm", "shared_head.norm")),  # type: ignore[arg-type]
    embedding="model.layers.3.embed_tokens.weight",
)
FURTHER = {
    "deepseek_v3": _BEHIND,
    "glm4_moe": _BEHIND,
    "glm4_moe_lite": _BEHIND,
    "qwen3_next": Further({"model.layers.1.": "mtp.layers.0."}, _QWEN, ""),
    "qwen3_5_moe": Further({"model.language_model.layers.1.": "mtp.layers.0."}, _QWEN, "mtp_num_hidden_layers"),
    "nemotron_h": Further(
        {"backbone.layers.2.": "mtp.layers.0.", "backbone.layers.3.": "mtp.layers.1."},
        ("mtp.layers.0.eh_proj", "mtp.layers.0.enorm", "mtp.layers.0.hnorm", "mtp.layers.1.final_layernorm"),
    ),
}
SHARE = 0.9  # of the weights of the layers that a block is made like


def change_config(name: str, folder: Path, **changes: Any) -> None:
    """Change the configuration of the language model."""
    table = FAMILIES[name].nested
    path = folder / "config.json"
    if table:
        changes = {table: {**json.loads(path.read_text())[table], **changes}}
        changes[table] = {key: value for key, value in changes[table].items() if value is not ...}
    toys.change_json(path, **changes)


def with_further_block(name: str, checkpoint: Path, folder: Path) -> Path:
    """The checkpoint with one block more, made like layers of it."""
    further = FURTHER[name]
    copied(checkpoint, folder)
    weights = load_file(folder / SINGLE)
    random = torch.Generator().manual_seed(3)
    for theirs, ours in further.parts.items():
        like = {key: value for key, value in weights.items() if key.startswith(theirs)}
        assert like
        weights |= {key.replace(theirs, ours): SHARE * value for key, value in like.items()}
    embeddings = next(value for key, value in weights.items() if "embed" in key)
    width = embeddings.shape[1]
    fusion, *norms = further.own
    weights[f"{fusion}.weight"] = torch.randn(width, 2 * width, generator=random) / width**0.5
    weights |= {f"{norm}.weight": 0.5 + torch.rand(width, generator=random) for norm in norms}
    if further.embedding:
        weights[further.embedding] = torch.randn(embeddings.shape, generator=random)
    (folder / SINGLE).unlink()  # another link to the file of the checkpoint
    save_file(weights, folder / SINGLE)
    count = {further.count: 1} if further.count else {}
    change_config(name, folder, **count, **dict.fromkeys(further.absent, ...))
    return folder


@contextmanager
def drafting(path: Path) -> Iterator[Any]:
    """A context for drafts of the file; None where llama.cpp has no graph for them, or the file no block."""
    log = Log()
    params = binding.llama_model_default_params()
    params.load_mtp, params.n_gpu_layers = True, 0
    model = binding.llama_model_load_from_file(str(path).encode(), params)
    assert model, log.errors()
    settings = binding.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = LENGTH
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = settings.flash_attn_type = 0  # in F32, without rounding
    settings.ctx_type = 1  # LLAMA_CONTEXT_TYPE_MTP
    context = binding.llama_init_from_model(model, settings)
    try:
        yield context
    finally:
        if context:
            binding.llama_free(context)
        binding.llama_model_free(model)


def drafts(path: Path, tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """llama.cpp's log-probabilities [tokens, vocabulary] behind each of ``tokens`` [tokens], from the block that
    is given the model's ``states`` [tokens, width]."""
    ids, rows = tokens.numpy().astype(np.int32), np.ascontiguousarray(states.numpy(), np.float32)
    with drafting(path) as context:
        batch = binding.llama_batch_init(len(ids), 0, 1)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = int(token), index, 1
            batch.seq_id[index][0], batch.logits[index] = 0, 1
        batch.n_tokens = len(ids)
        batch.embd = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert binding.llama_decode(context, batch) == 0
        vocabulary = binding.llama_vocab_n_tokens(binding.llama_model_get_vocab(binding.llama_get_model(context)))
        logits = np.ctypeslib.as_array(binding.llama_get_logits(context), (len(ids), vocabulary)).copy()
        batch.embd = ctypes.POINTER(ctypes.c_float)()  # numpy's own
        binding.llama_batch_free(batch)
    return torch.log_softmax(torch.from_numpy(logits).double(), -1)


class Centred(torch.nn.Module):
    """The last norm of Nemotron's block as llama.cpp computes it; the original does not subtract the mean."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(states, states.shape[-1:], self.weight, None, self.epsilon)


def expected_drafts(
    name: str, model: Any, weights: Mapping[str, torch.Tensor], tokens: torch.Tensor, states: torch.Tensor
) -> torch.Tensor:
    """What transformers' own layers make of the same, with the weights of the block.

    Args:
        model: whose layers the block was made like; it is changed.
        weights: of the checkpoint with the block.
    """
    further = FURTHER[name]
    fusion, embedding_norm, state_norm, last_norm = (weights[f"{own}.weight"] for own in further.own)
    inner = getattr(model.model, "language_model", model.model)
    layers = [inner.layers[int(like.rstrip(".").split(".")[-1])] for like in further.parts]
    norm = inner.norm_f if name == "nemotron_h" else inner.norm
    embeddings = weights[further.embedding] if further.embedding else inner.get_input_embeddings().weight

    def normed(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        norm.weight.data.copy_(weight)
        return norm(values)  # type: ignore[no-any-return]

    with torch.no_grad():
        for layer in layers:
            for value in layer.state_dict().values():
                value.mul_(SHARE)
        pair = [normed(embeddings[tokens], embedding_norm), normed(states, state_norm)]
        inner.layers = torch.nn.ModuleList(layers)
        config = inner.config
        config.num_hidden_layers = len(layers)
        if getattr(config, "layer_types", None):
            config.layer_types = ["full_attention", "moe"][: len(layers)]
        if name == "nemotron_h":
            inner.norm_f = Centred(last_norm, config.layer_norm_epsilon)
        else:
            norm.weight.data.copy_(last_norm)
        fused = torch.cat(pair, -1) @ fusion.T
        hidden = inner(inputs_embeds=fused[None], use_cache=False).last_hidden_state
        return torch.log_softmax(model.lm_head(hidden)[0].double(), -1)


@pytest.mark.parametrize("name", FURTHER)
def test_kept_block_drafts_what_transformers_layers_compute(name: str, made: Any, tmp_path: Path) -> None:
    """Whole, and with half of the experts."""
    checkpoint, _ = made(name)
    folder, kept, half = (
        with_further_block(name, checkpoint, tmp_path / "model"),
        tmp_path / "kept",
        tmp_path / "half",
    )
    convert(folder, kept, "f32", mtp=True)
    tokens = token_windows(checkpoint, tmp_path)[0]
    states = torch.randn(LENGTH, 256, generator=torch.Generator().manual_seed(5))
    weights = load_file(folder / SINGLE)
    whole = expected_drafts(name, loaded(name, checkpoint), weights, tokens, states)
    assert_same(whole, drafts(kept, tokens, states))

    architecture = read_architecture(GgufFile(kept), mtp=True)
    chosen = families.kept_experts(architecture.layers, architecture.groups)
    keep = {layer: chosen[layer] for layer in architecture.moe_layers}
    like = max(int(part.split(".")[-2]) for part in FURTHER[name].parts)  # the layer with the experts
    (block,) = architecture.further_moe_layers
    plan = Plan(
        arch=architecture.arch,
        experts=architecture.experts,
        kept=families.KEPT,
        keep={**keep, block: keep[like]},
        types={},
        launch=Launch(),
        method="test",
        origin="user",
        predicted=Prediction(),
        made_from={"source": "toy"},
        mtp=True,
    )
    builder.build(str(kept), plan.to_json(), str(half), "")
    small = families.without_experts(name, loaded(name, checkpoint), keep, {})
    small.set_attn_implementation("eager")
    expected = expected_drafts(name, small, weights, tokens, states)
    assert_same(expected, drafts(half, tokens, states))
    assert divergence(whole, expected)[0] > 0.01


def about_blocks(remarks: list[str]) -> list[str]:
    return [line for line in remarks if "vision" not in line]


@pytest.mark.parametrize("name", FURTHER)
def test_block_is_left_out_with_a_remark_and_changes_nothing_where_it_is_kept(
    name: str, made: Any, tmp_path: Path
) -> None:
    checkpoint, gguf = made(name)
    folder = with_further_block(name, checkpoint, tmp_path / "model")
    (remark,) = about_blocks(convert(folder, tmp_path / "dropped.gguf", "f32"))
    assert remark.startswith("left out: blocks that predict further tokens, ")
    assert_same_file(gguf, tmp_path / "dropped.gguf")
    assert about_blocks(convert(folder, tmp_path / "kept.gguf", "f32", mtp=True)) == []
    file = GgufFile(tmp_path / "kept.gguf")
    arch, layers = file.get("general.architecture"), read_architecture(GgufFile(gguf)).layers
    assert (file.get(f"{arch}.block_count"), file.get(f"{arch}.nextn_predict_layers")) == (layers + 1, 1)
    assert require_convertible(open_checkpoint(folder), mtp=True).settings.further == 1
    with drafting(tmp_path / "kept.gguf") as context:
        assert context
    with drafting(gguf) as context:
        assert not context
    tokens = token_windows(checkpoint, tmp_path).tolist()
    assert torch.equal(log_probabilities(tmp_path / "kept.gguf", tokens), log_probabilities(gguf, tokens))
    if FURTHER[name].count:  # published configurations count a block that a checkpoint may lack
        none = copied(checkpoint, tmp_path / "none")
        change_config(name, none, **{FURTHER[name].count: 1})
        assert about_blocks(convert(none, tmp_path / "none.gguf", "f32", mtp=True)) == []
        assert_same_file(gguf, tmp_path / "none.gguf")


@pytest.mark.parametrize("name", [name for name in FURTHER if FURTHER[name] == _BEHIND])
def test_a_block_behind_the_last_layer_that_is_not_counted_is_not_known(name: str, made: Any, tmp_path: Path) -> None:
    folder = with_further_block(name, made(name)[0], tmp_path / "model")
    toys.change_json(folder / "config.json", num_nextn_predict_layers=0)
    with pytest.raises(BadFile, match=r"config\.json says 3 layers, the weights hold 4"):
        convert(folder, tmp_path / "model.gguf", "f32")


@pytest.mark.parametrize("name", FURTHER)
def test_a_part_of_a_kept_block_that_has_no_place_is_named(name: str, made: Any, tmp_path: Path) -> None:
    folder = with_further_block(name, made(name)[0], tmp_path / "model")
    weights = load_file(folder / SINGLE)
    stranger = f"{list(FURTHER[name].parts.values())[-1]}stranger.weight"
    save_file({**weights, stranger: torch.ones(8)}, folder / SINGLE)
    with pytest.raises(Unsupported, match=f"has no place for {re.escape(stranger)}") as refusal:
        convert(folder, tmp_path / "model.gguf", mtp=True)
    assert "--mtp drop" in refusal.value.hint
    assert len(about_blocks(convert(folder, tmp_path / "model.gguf"))) == 1


@pytest.mark.parametrize("name", ["qwen3_5_moe", "nemotron_h"])
def test_two_blocks_where_llama_cpp_computes_one_can_be_left_out_only(name: str, made: Any, tmp_path: Path) -> None:
    folder = with_further_block(name, made(name)[0], tmp_path / "model")
    change_config(name, folder, **{FURTHER[name].count: 2})
    with pytest.raises(Unsupported, match=r"has 2 blocks that .*; llama\.cpp's .* computes one"):
        convert(folder, tmp_path / "model.gguf", mtp=True)
    assert len(about_blocks(convert(folder, tmp_path / "model.gguf", "f32"))) == 1
