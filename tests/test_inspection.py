"""What a model weighs and where it would fit: a checkpoint and the GGUF made from it get the same answers."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import toys
from runs import run_edgeprune

from edgeprune import inspection
from edgeprune.cli import show
from edgeprune.device.profile import find_profile, user_folder
from edgeprune.errors import DoesNotFit, NativeCrash
from edgeprune.fitting import smallest_bytes
from edgeprune.inspection import Inspection, inspect_model
from edgeprune.model.architecture import read_architecture
from edgeprune.model.checkpoint import open_checkpoint
from edgeprune.model.convert import convert
from edgeprune.model.converter import converter_for
from edgeprune.model.gguf import GgufFile, TensorShape, file_bytes, header, make_entry
from edgeprune.pipeline import opened
from edgeprune.settings import Settings, Silent

FAMILIES = ["qwen3_moe", "mixtral", "olmoe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_sized_as_its_gguf_is(family: str, toy_checkpoint: toys.Maker, toy_gguf: toys.Maker) -> None:
    whole = read_architecture(GgufFile(toy_gguf(family)))
    sketch = inspection._sketch(open_checkpoint(toy_checkpoint(family)), converter_for(family))
    assert (sketch.experts, sketch.used) == (whole.experts, whole.used)
    assert sketch.allowed_counts() == whole.allowed_counts()
    for kept in whole.allowed_counts():
        assert smallest_bytes(sketch, kept) == pytest.approx(smallest_bytes(whole, kept), rel=0.02)
    assert sketch.nbytes == pytest.approx(whole.nbytes, rel=0.02)


def sparse(
    folder: Path, *, experts: int, used: Any, width: int, hidden: int, stacked: bool, dtype: str = "BF16"
) -> Path:
    """A checkpoint of one layer with weights of zero, which take no room on the disk."""
    shapes = {"model.embed_tokens.weight": [32_000, width], "model.layers.0.mlp.gate.weight": [experts, width]}
    block = "model.layers.0.mlp.experts."
    if stacked:
        shapes |= {
            f"{block}gate_up_proj": [experts, 2 * hidden, width],
            f"{block}down_proj": [experts, width, hidden],
        }
    else:
        for expert in range(experts):
            shapes |= {f"{block}{expert}.{part}_proj.weight": [hidden, width] for part in ("gate", "up")}
            shapes[f"{block}{expert}.down_proj.weight"] = [width, hidden]
    described, end = {}, 0
    for name, (rows, *rest) in shapes.items():
        own = dtype if "experts" in name else "BF16"
        begin, end = end, end + (2 if own == "BF16" else 1) * rows * rest[0] * (rest[1] if len(rest) > 1 else 1)
        described[name] = {"dtype": own, "shape": [rows, *rest], "data_offsets": [begin, end]}
    encoded = json.dumps(described).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        stream.truncate(8 + len(encoded) + end)
    values = {"model_type": "qwen3_moe", "num_experts": experts, "num_experts_per_tok": used}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def verdicts(found: Inspection) -> list[tuple[str, int, str]]:
    """Of every profile. What a process takes varies a little from one to the next."""
    return [(fit.verdict, fit.kept, fit.type) for fit in found.fits]


def verdict(found: Inspection, profile: str) -> str:
    return next(fit.verdict for fit in found.fits if fit.profile == profile)


@pytest.mark.parametrize("stacked", [False, True], ids=["one by one", "stacked"])
def test_a_checkpoint_that_can_never_fit_is_told_so(stacked: bool, tmp_path: Path) -> None:
    folder = sparse(tmp_path / "large", experts=64, used=8, width=16_384, hidden=49_152, stacked=stacked)
    found = inspect_model(str(folder))
    assert found.nbytes > 279 << 30
    assert dict(found.facts)["conversion"].startswith("refused: this qwen3_moe checkpoint has ")
    assert dict(found.facts)["experts"] == "64 per layer, 8 per token"
    # 8 experts of 2.25 GiB weights at 1.5625 bits each are 3.5 GiB; 32 and 64 of them are 14 and 28 GiB; at 2.0625
    # bits 8 are 4.7 GiB, 16 are 9.3 GiB, and all of them 37 GiB.
    but = "cannot be converted; by its size: "
    assert verdict(found, "rpi5-8gb") == f"{but}pruned to 8 of 64 experts, IQ2_XXS"
    assert verdict(found, "cpu-16gb") == f"{but}pruned to 16 of 64 experts, IQ2_XXS"
    assert verdict(found, "cpu-32gb") == f"{but}pruned to 32 of 64 experts, IQ2_XXS"
    assert verdict(found, "strix-halo-128gb") == f"{but}quantised to IQ3_S, all 64 experts"
    toys.change_json(folder / "config.json", num_experts_per_tok=32)
    assert verdict(inspect_model(str(folder)), "rpi5-8gb").startswith(f"{but}no, short of ")


@pytest.mark.parametrize("value", ["8", True, 0, -1, 10**9, None, [8, 4]])
def test_what_the_configuration_leaves_open_is_taken_from_the_tensors(value: Any, tmp_path: Path) -> None:
    folder = sparse(tmp_path / "small", experts=8, used=value, width=256, hidden=256, stacked=False)
    toys.change_json(folder / "config.json", num_experts=value)
    assert dict(inspect_model(str(folder)).facts)["experts"] == "8 per layer, 1 per token"


def test_a_header_without_extents_is_no_obstacle(tmp_path: Path) -> None:
    folder = sparse(tmp_path / "small", experts=8, used=2, width=256, hidden=256, stacked=False)
    encoded = json.dumps(
        {
            "scale": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
            "x.experts.0.bias": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [4, 8]},
        }
    ).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(8))
    with pytest.raises(inspection.Unsupported, match="dense"):
        inspect_model(str(folder))


# The same checkpoint as conversion will see it.


def test_a_checkpoint_that_can_be_converted_is_its_gguf(toy_checkpoint: toys.Maker, toy_gguf: toys.Maker) -> None:
    here, made = inspect_model(str(toy_checkpoint("qwen3_moe"))), inspect_model(str(toy_gguf("qwen3_moe")))
    assert (here.roles, verdicts(here), here.nbytes) == (made.roles, verdicts(made), made.nbytes)
    facts, others = dict(here.facts), dict(made.facts)
    for key in ("layers", "experts", "experts that may be kept", "context", "types", "KV cache and buffers"):
        assert facts[key] == others[key]


def test_shapes_that_llama_cpp_does_not_take_are_named(toy_checkpoint: toys.Maker, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy_checkpoint("qwen3_moe"), tmp_path / "model"))
    toys.change_json(folder / "config.json", num_attention_heads=8)
    refusal = dict(inspect_model(str(folder)).facts)["conversion"]
    assert "self_attn.q_proj.weight has the shape [256, 256], which does not fit config.json" in refusal


def test_fp8_is_counted_as_the_bf16_that_it_becomes(tmp_path: Path) -> None:
    folder = sparse(tmp_path / "fp8", experts=8, used=2, width=1024, hidden=1024, stacked=False, dtype="F8_E4M3")
    plain = sparse(tmp_path / "bf16", experts=8, used=2, width=1024, hidden=1024, stacked=False)
    assert inspect_model(str(folder)).nbytes == inspect_model(str(plain)).nbytes
    assert verdicts(inspect_model(str(folder))) == verdicts(inspect_model(str(plain)))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "AWQ": ({"quantization_config": {"quant_method": "awq"}}, "is quantised already, as 'awq'"),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq"}}, "is quantised already, as 'gptq'"),
    "a sliding window": ({"use_sliding_window": True}, "use_sliding_window = True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_be_converted_is_told(case: str, toy_checkpoint: toys.Maker, tmp_path: Path) -> None:
    changes, cause = REFUSED[case]
    folder = Path(shutil.copytree(toy_checkpoint("qwen3_moe"), tmp_path / "model"))
    toys.change_json(folder / "config.json", **changes)
    found = inspect_model(str(folder))
    assert cause in dict(found.facts)["conversion"]
    assert found.refusal is not None and cause in found.refusal.cause and cause in found.to_json()["refusal"]
    assert {fit.verdict for fit in found.fits} == {"cannot be converted; by its size: as it is"}
    assert dict(found.facts)["KV cache and buffers"].startswith("by formula")
    # 2 layers, keys and values of all heads, F16, and 16,384 tokens or what the profile says.
    config = json.loads((folder / "config.json").read_text())
    row = config["num_key_value_heads"] * config["head_dim"] * 2
    context = find_profile("cpu-16gb").context
    cache = 2 * config["num_hidden_layers"] * context * row
    (own,) = [fit for fit in found.fits if fit.profile == "cpu-16gb"]
    assert own.beside_bytes == cache + 4 * 512 * config["vocab_size"]


def test_the_kv_cache_takes_room_from_the_weights(tmp_path: Path) -> None:
    """20 GiB of weights on a machine with 27 GiB, beside a cache of 8 GiB."""
    shapes = {"token_embd.weight": (2048, 32_000), "output_norm.weight": (2048,)}
    for layer in range(32):
        own: dict[str, tuple[int, ...]] = {name: (2048,) for name in ("attn_norm", "ffn_norm")}
        own |= {"attn_q": (2048, 4096), "attn_k": (2048, 4096), "attn_v": (2048, 4096), "attn_output": (4096, 2048)}
        own |= {"attn_q_norm": (128,), "attn_k_norm": (128,), "ffn_gate_inp": (2048, 48)}
        own |= {"ffn_gate_exps": (2048, 1024, 48), "ffn_up_exps": (2048, 1024, 48), "ffn_down_exps": (1024, 2048, 48)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in own.items()}
    numbers = {"block_count": 32, "context_length": 65_536, "embedding_length": 2048, "feed_forward_length": 1024}
    numbers |= {"attention.head_count": 32, "attention.head_count_kv": 32, "expert_count": 48, "expert_used_count": 4}
    numbers |= {"attention.key_length": 128, "attention.value_length": 128, "expert_feed_forward_length": 1024}
    entries = [make_entry("general.architecture", "str", "qwen3moe")]
    entries += [make_entry(f"qwen3moe.{key}", "u32", value) for key, value in numbers.items()]
    entries.append(make_entry("qwen3moe.attention.layer_norm_rms_epsilon", "f32", 1e-6))
    entries.append(make_entry("qwen3moe.rope.freq_base", "f32", 1e6))
    tensors = [
        TensorShape(name, shape, "F32" if len(shape) == 1 or "gate_inp" in name else "BF16")
        for name, shape in shapes.items()
    ]
    path = tmp_path / "long.gguf"
    with path.open("wb") as stream:
        top = header(entries, tensors, 32)
        stream.write(top)
        stream.truncate(file_bytes(len(top), tensors, 32))
    found = inspect_model(str(path))
    (fit,) = [fit for fit in found.fits if fit.profile == "cpu-32gb"]
    cache = 2 * 32 * find_profile("cpu-32gb").context * 4096 * 2  # bytes
    assert found.nbytes < fit.usable_bytes  # weights alone would fit
    assert cache < fit.beside_bytes < cache + (1 << 30) and found.nbytes > fit.usable_bytes - fit.beside_bytes
    assert fit.verdict.startswith("quantised to ") and fit.kept == 48


def test_experts_that_cannot_be_dropped_are_told_of_a_checkpoint(tmp_path: Path) -> None:
    path = toys.synthetic_gguf(tmp_path / "maverick.gguf", "llama4", experts=128, used=1, expert_width=32)
    assert "128" in dict(inspect_model(str(path)).facts)["experts that may be kept"]


def test_checkpoint_whose_tokenizer_is_missing_cannot_be_converted(
    toy_checkpoint: toys.Maker, tmp_path: Path
) -> None:
    shutil.copytree(toy_checkpoint("qwen3_moe"), tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    done = run_edgeprune("inspect", "model", cwd=tmp_path)
    assert done.returncode == 1 and "model holds no tokenizer.json" in done.stderr
    assert "routed experts" in done.stdout  # which is to be known all the same


def test_differences_of_the_tokenizer_are_told(toy_checkpoint: toys.Maker, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy_checkpoint("qwen3_moe"), tmp_path / "model"))
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["normalizer"] = {"type": "NFC"}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    convert(folder, tmp_path / "model.gguf")
    for place in (folder, tmp_path / "model.gguf"):
        assert "does not compose characters (NFC)" in dict(inspect_model(str(place)).facts)["tokenizer"]


# Verdicts against what llama.cpp and `plan` say.


def test_a_cache_that_llama_cpp_does_not_make_costs_other_profiles_nothing(tmp_path: Path) -> None:
    """Heads of 16 are no multiple of the 32 of a Q8_0 block."""
    path = toys.synthetic_gguf(tmp_path / "model.gguf", width=64, experts=4, expert_width=64)
    found = inspect_model(str(path))
    for fit in found.fits:
        if find_profile(fit.profile).kv_type == "f16":
            assert fit.verdict == "as it is" and fit.beside_bytes > 1 << 20
        else:
            assert fit.verdict == "no context of 2,048 tokens with a Q8_0 cache" and fit.kept == 0
    assert {find_profile(fit.profile).kv_type for fit in found.fits} == {"f16", "q8_0"}
    assert "does not divide n_embd_head_k=16; try --kv-type f16" in dict(found.facts)["Q8_0 cache"]
    assert found.refusal is None


def unloadable(change: str, path: Path) -> Path:
    """A GGUF that llama.cpp does not load."""
    toys.synthetic_gguf(path, width=64, experts=4, expert_width=64)
    old, new = change.encode().split(b" ")
    path.write_bytes(path.read_bytes().replace(old, new))
    return path


@pytest.mark.parametrize("change", ["blk.1.ffn_gate_inp blk.1.ffn_gate_imp", "qwen3moe qwen9moe"])
def test_what_llama_cpp_does_not_load_fits_nowhere(change: str, tmp_path: Path) -> None:
    path = unloadable(change, tmp_path / "model.gguf")
    found = inspect_model(str(path))
    assert {(fit.verdict, fit.kept) for fit in found.fits} == {("llama.cpp cannot load it", 0)}
    assert found.refusal is not None and "llama.cpp cannot load" in found.refusal.cause
    done = run_edgeprune("inspect", path)
    assert done.returncode == 1 and "routed experts" in done.stdout and "error: llama.cpp cannot load" in done.stderr


def test_what_crashes_llama_cpp_fits_nowhere(tmp_path: Path) -> None:
    used = ("expert_used_count", "[u32]", [2, 0])
    path = toys.synthetic_gguf(tmp_path / "model.gguf", width=64, experts=4, expert_width=64, extra=(used,))
    found = inspect_model(str(path))
    assert {fit.verdict for fit in found.fits} == {"llama.cpp cannot load it"}
    assert isinstance(found.refusal, NativeCrash)


PROFILE = """
name = "{name}"
summary = "of a test"
backend = "{backend}"
threads = 2
pools.ram = {{ total = "{ram} KiB", reserve = "0 MiB", bandwidth = "20 GB/s" }}
defaults = {{ context = 2048, kv_type = "f16" }}
types.avoid = []
"""
VRAM = 'pools.vram = {{ total = "{vram} KiB", reserve = "0 MiB", bandwidth = "200 GB/s" }}'


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_verdicts_near_the_limit_are_those_of_the_plan(
    backend: str, toy_gguf: toys.Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(toy_gguf("qwen3_moe"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("APPDATA", str(tmp_path / "config"))
    user_folder().mkdir(parents=True)
    whole = inspect_model(model)
    beside = next(fit.beside_bytes for fit in whole.fits if fit.profile == "cpu-16gb")
    sizes = [beside + share * whole.nbytes // 8 for share in (-4, 1, 4, 7, 9, 12)]
    sizes[-1] += 8 << 20  # what the process itself takes varies by a few MiB
    for size in sizes:
        ram = size if backend == "cpu" else beside - (7 << 20)
        text = PROFILE.format(name=f"of-{size}", backend=backend, ram=ram >> 10)
        text += VRAM.format(vram=max(size - ram, 1 << 20) >> 10) if backend == "cuda" else ""
        (user_folder() / f"of-{size}.toml").write_text(text)
    said, planned = inspect_model(model), {}
    for size in sizes:
        wishes = Settings(model, device=f"of-{size}", output=str(tmp_path / f"run-{size}"))
        with opened(wishes, Silent()) as run:
            try:
                run._fail_early()
                planned[size] = "as it is" if run._untouched() is not None else "smaller"
            except DoesNotFit:
                planned[size] = "no"
    assert set(planned.values()) >= {"as it is", "smaller"}
    for size, outcome in planned.items():
        own = verdict(said, f"of-{size}")
        kind = "no" if "no, " in own else "as it is" if "as it is" in own else "smaller"
        assert kind == outcome or own.startswith("about: "), (size - beside, own, outcome)
    assert verdict(said, f"of-{sizes[-1]}") == "as it is"


def test_a_long_fact_is_wrapped_and_widens_no_line(toy_checkpoint: toys.Maker, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy_checkpoint("qwen3_moe"), tmp_path / "model"))
    toys.change_json(folder / "config.json", num_attention_heads=8)
    found = inspect_model(str(folder))
    assert max(len(figure) for _, figure in found.facts) > 150
    assert max(map(len, show.inspection(found))) <= 118
