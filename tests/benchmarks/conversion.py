"""Peak memory of converting a checkpoint of several gigabytes, against the largest group of its tensors.

    python tests/benchmarks/conversion.py [--layers 3] [--experts 128] [--type auto] [--shards one|layer] [--stacked]
        [--fp8]

The checkpoint has the extents of Qwen3-30B-A3B (width 2048, expert width 768) and random weights, in one file or in
one for each layer; it is written into the temporary folder, which needs room for it and its GGUF. Converts in a
process of its own, whose peak memory includes everything: interpreter, torch, mapped pages of the shards. A group is
what one GGUF tensor is made of: the embedding matrix, or the gate, up or down matrices of all experts of a layer;
counted in BF16.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

WIDTH, EXPERT_WIDTH, VOCABULARY = 2048, 768, 151_936
_BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
_CONVERT = """
import sys
from pathlib import Path
from edgeprune.measure.child import peak_memory_bytes
from edgeprune.model.convert import convert
import torch, safetensors.torch
before = peak_memory_bytes()
convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
print(before, peak_memory_bytes())
"""


def layer_shapes(layer: int, experts: int, *, stacked: bool) -> dict[str, tuple[int, ...]]:
    """Shapes by name, as published (one by one) or as transformers keeps them."""
    block = f"model.layers.{layer}."
    heads = {"q_proj": (4096, WIDTH), "k_proj": (512, WIDTH), "v_proj": (512, WIDTH), "o_proj": (WIDTH, 4096)}
    found: dict[str, tuple[int, ...]] = {f"{block}self_attn.{name}.weight": shape for name, shape in heads.items()}
    found |= {f"{block}self_attn.{name}.weight": (128,) for name in ("q_norm", "k_norm")}
    found |= {f"{block}{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
    found[f"{block}mlp.gate.weight"] = (experts, WIDTH)
    if stacked:
        found[f"{block}mlp.experts.gate_up_proj"] = (experts, 2 * EXPERT_WIDTH, WIDTH)
        found[f"{block}mlp.experts.down_proj"] = (experts, WIDTH, EXPERT_WIDTH)
        return found
    for expert in range(experts):
        own = f"{block}mlp.experts.{expert}."
        found |= {f"{own}{part}_proj.weight": (EXPERT_WIDTH, WIDTH) for part in ("gate", "up")}
        found[f"{own}down_proj.weight"] = (WIDTH, EXPERT_WIDTH)
    return found


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], *, fp8: bool) -> None:
    """A shard with random weights."""
    described, end = {}, 0
    for name, shape in list(shapes.items()):
        kind = "F8_E4M3" if fp8 and ".experts." in name else "BF16"
        own = {name: (kind, shape)}
        if kind != "BF16":
            own[f"{name}_scale_inv"] = ("F32", (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128)))
        for each, (form, extents) in own.items():
            begin, end = end, end + _BYTES[form] * int(np.prod(extents))
            described[each] = {"dtype": form, "shape": extents, "data_offsets": [begin, end]}
    top = json.dumps(described).encode()
    random = np.random.default_rng(end)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(top)) + top)
        for entry in described.values():
            begin, stop = entry["data_offsets"]
            form, count = entry["dtype"], (stop - begin) // _BYTES[entry["dtype"]]
            for start in range(0, count, 1 << 24):
                size = min(1 << 24, count - start)
                if form == "F8_E4M3":  # every pattern but those of NaN
                    stream.write((random.integers(0, 256, size, np.uint8) & 0xF7).data)
                else:
                    values = np.abs(random.standard_normal(size, np.float32)) + np.float32(1e-3)
                    values = values if form == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16)
                    stream.write(values.data)


def write_checkpoint(folder: Path, layers: int, experts: int, *, shards: str, stacked: bool, fp8: bool) -> int:
    """A checkpoint under ``folder`` in ``one`` shard, or one for each ``layer``. Returns its bytes."""
    import edgeprune

    demo = Path(edgeprune.__file__).parent / "demo"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder / name)
    config = json.loads((demo / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": WIDTH, "moe_intermediate_size": EXPERT_WIDTH, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": VOCABULARY}
    config |= {"num_experts": experts, "num_local_experts": experts, "tie_word_embeddings": True}
    if fp8:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    parts = [layer_shapes(layer, experts, stacked=stacked) for layer in range(layers)]
    parts.append({"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)})
    if shards == "one":
        whole = {name: shape for part in parts for name, shape in part.items()}
        write_shard(folder / "model.safetensors", whole, fp8=fp8)
        return (folder / "model.safetensors").stat().st_size
    weight_map = {}
    for number, shapes in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_shard(folder / name, shapes, fp8=fp8)
        with (folder / name).open("rb") as stream:
            top = stream.read(struct.unpack("<Q", stream.read(8))[0])
        weight_map |= dict.fromkeys(json.loads(top), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@click.command()
@click.option("--layers", default=3, show_default=True)
@click.option("--experts", default=128, show_default=True)
@click.option("--type", "base", default="auto", show_default=True)
@click.option("--shards", type=click.Choice(["one", "layer"]), default="one", show_default=True)
@click.option("--stacked", is_flag=True, help="The experts of a layer in one tensor.")
@click.option("--fp8", is_flag=True, help="Experts in FP8 with a scale for each block.")
def main(layers: int, experts: int, base: str, shards: str, stacked: bool, fp8: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="edgeprune-conversion-") as name:
        folder, output = Path(name) / "checkpoint", Path(name) / "model.gguf"
        size = write_checkpoint(folder, layers, experts, shards=shards, stacked=stacked, fp8=fp8)
        started = time.perf_counter()
        command = [sys.executable, "-c", _CONVERT, str(folder), str(output), base]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        seconds = time.perf_counter() - started
        before, peak = map(int, found)
        group = 2 * WIDTH * max(VOCABULARY, experts * EXPERT_WIDTH)
        made = output.stat().st_size
    mib = 1 << 20
    print(f"checkpoint {size / mib:,.0f} MiB, GGUF {made / mib:,.0f} MiB, largest group {group / mib:,.0f} MiB")
    print(f"{seconds:.1f} s, peak {peak / mib:,.0f} MiB, of it {before / mib:,.0f} MiB before anything was read")
    print(f"above the largest group: {(peak - group) / mib:,.0f} MiB")


if __name__ == "__main__":
    main()
