"""The language that converters are written in: what it refuses, and what its words mean."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from runs import run_edgeprune
from safetensors.torch import load_file, save_file

from edgeprune.device.lookup import user_folder
from edgeprune.errors import BadFile, EdgepruneError, Unsupported
from edgeprune.files import data_folder
from edgeprune.model.checkpoint import SINGLE, open_checkpoint
from edgeprune.model.convert import SOURCE_KEY, convert
from edgeprune.model.converter import Converter, converter_for, load_converter, own_converter, shipped_converters
from edgeprune.model.gguf import GgufFile
from edgeprune.model.transforms import TRANSFORMS, Sizes
from edgeprune.model.values import Settings, metadata_entries, prefix_of, read_settings

CONVERTER = """
name = "toy"
arch = "toy"
layers = "num_hidden_layers"
experts = "num_experts"
{top}

[metadata]
block_count = {{ type = "u32", config = "num_hidden_layers" }}
{metadata}

[tensors]
"token_embd.weight" = [{{ name = "{{model}}embed_tokens.weight" }}]
{tensors}
"""
CONFIG = {"num_hidden_layers": 4, "num_experts": 8, "num_attention_heads": 2, "width": 48, "part": 0.5}


def converter(folder: Path, top: str = "", metadata: str = "", tensors: str = "") -> Converter:
    path = folder / "toy.toml"
    path.write_text(CONVERTER.format(top=top, metadata=metadata, tensors=tensors))
    return load_converter(path)


def settings(folder: Path, config: Mapping[str, Any], top: str = "", metadata: str = "") -> Settings:
    """What a converter reads from a configuration, beside a checkpoint of one tensor."""
    save_file({"model.layers.2.mlp.gate.weight": torch.ones(2, 2)}, folder / SINGLE)
    (folder / "config.json").write_text("{}")
    toys.change_json(folder / "config.json", **{**CONFIG, **config})
    return read_settings(converter(folder, top, metadata), open_checkpoint(folder))


BROKEN: dict[str, tuple[str, str, str, str]] = {
    "an operation of the past": ("", "a = { type = 'u32', power = ['x', 2] }", "", "unknown keys: power"),
    "two operations": ("", "a = { type = 'u32', sum = ['x'], product = ['y'] }", "", "more than one way"),
    "a constant and a key": ("", "a = { type = 'u32', value = 1, config = 'x' }", "", "more than one way"),
    "no source": ("", "a = { type = 'u32' }", "", "has no source"),
    "an unknown type in an array": ("", "a = { type = '[u7]', config = 'x' }", "", r"unknown type \[u7\]"),
    "keys that are a number": ("", "a = { type = 'u32', config = 7 }", "", "neither a text nor a list of texts"),
    "by kind without an array": (
        "[kinds]\nb = { below = 'x' }",
        "a = { type = 'u32', by_kind = { b = 1 } }",
        "",
        "by_kind is for arrays",
    ),
    "by an unknown kind": ("", "a = { type = '[u32]', by_kind = { b = 1 } }", "", "by_kind is for arrays"),
    "layers of an unknown kind": ("", "a = { type = 'u32', layers_of = 'b' }", "", "unknown kind b"),
    "tensors of an unknown kind": ("", "", "[tensors_of.b]\nx = [{ name = 'y' }]", "unknown kind b"),
    "two rules": ("[kinds]\na = { below = 'x', every = 'y' }", "", "", "needs one of: below, every"),
    "a list that equals nothing": ("[kinds]\na = { list = 'x' }", "", "", "needs one of"),
    "unless a later kind": (
        "[kinds]\na = { unless = 'b' }\nb = { below = 'x' }",
        "",
        "",
        "the kind b is not described before",
    ),
    "a requirement of nothing": ("[require]\na = { default = 1 }", "", "", "needs one of: is, one_of"),
    "an unknown setting of the rope": ("[rope]\nspeed = 1", "", "", "unknown keys: speed"),
    "an architecture that is a number": ("nested = 3", "", "", r"nested = '3' is not a text"),
    "kinds that are a number": ("kinds = 3", "", "", "another kind than it should"),
    "left out, a number": ("left_out = 3", "", "", "another kind than it should"),
    "sources that are a number": ("", "", "x = 3", "'3' is not a list"),
    "a source without a text": (
        "",
        "",
        "x = [{ name = 3 }]",
        r"'3' is no name with places for \{layer\}, \{expert\}",
    ),
    "a place of another name": ("", "", "x = [{ name = 'a.{block}' }]", r"'a\.\{block\}' is no name with places"),
    "a brace left open": ("", "", "x = [{ name = 'a.{layer' }]", r"'a\.\{layer' is no name with places"),
    "a name in GGUF for experts": (
        "",
        "",
        "'x.{expert}' = [{ name = 'y' }]",
        r"is no name with places for \{layer\}",
    ),
    "a tensor of another place": ("[kinds]\na = { has = 'x.{block}' }", "", "", "no name with places"),
    "a map that is a number": ("", "a = { type = 'u32', config = 'x', map = 3 }", "", "map is not a table"),
    "operands that are a text": ("", "a = { type = 'u32', sum = 'xy' }", "", "'xy' is not a list"),
    "kinds of a number": ("[kinds]\na = { list = 'x', equals = 3 }", "", "", "'3' is not a list"),
    "allowed, a text": ("[require]\na = { one_of = 'xy' }", "", "", "'xy' is not a list"),
    "a cycle that is a number": ("[require]\na = { cycle = 3 }", "", "", "'3' is not a list"),
    "a base that is a text": ("[rope]\nbase = 'x'", "", "", "base = 'x' is not a number"),
    "tables of numbers": ("[rope]\nparameters = [3]", "", "", r"rope: parameters"),
    "a scaling that is a number": ("[rope]\nscaling = 3", "", "", r"rope: scaling"),
    "a key that is a number": ("[require]\na = { same_as = 3 }", "", "", "same_as = '3' is not a text"),
    "a condition that is a number": ("[require]\na = { is = 1, unless = 3 }", "", "", "unless = '3' is not a text"),
    "an unknown transform": ("", "", "x = [{ name = 'y', transform = 'melt' }]", "unknown transform melt"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_converter_is_refused(case: str, tmp_path: Path) -> None:
    top, metadata, tensors, cause = BROKEN[case]
    with pytest.raises(BadFile, match=cause) as refusal:
        converter(tmp_path, top, metadata, tensors)
    assert "\n" not in refusal.value.cause and refusal.value.hint


KINDS = """
[kinds]
dense = { below = "first", default = 1 }
every = { every = "step" }
other = { unless = ["dense", "every"] }
named = { members = "these" }
linear = { list = "types", equals = ["linear", "L"] }
gated = { has = "model.layers.{layer}.mlp.gate.weight" }
normed = { when = "norm", equals = [true], default = false }
[derived]
half = { product = ["width", "part"] }
more = { sum = ["half", 1, 2] }
"""
FIELDS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "a constant": ("'u32', value = 7", {}, 7),
    "the first key there is": ("'u32', config = ['a', 'width']", {}, 48),
    "a key in a table": ("'u32', config = 'table.b'", {"table": {"b": 5}}, 5),
    "a default": ("'f32', config = 'a', default = 0.5", {}, 0.5),
    "a default that is not needed": ("'f32', config = 'part', default = 2.0", {}, 0.5),
    "a quotient": ("'u32', config = 'head', quotient = ['width', 'num_attention_heads']", {}, 24),
    "a key before its quotient": ("'u32', config = 'head', quotient = ['width', 2]", {"head": 32}, 32),
    "a product that is whole": ("'u32', product = ['width', 'part']", {}, 24),
    "a derived value": ("'u32', config = 'half'", {}, 24),
    "a value derived from another": ("'u32', config = 'more'", {}, 27),
    "a choice": ("'u32', config = 'gate', map = { sigmoid = 2, softmax = 1 }", {"gate": "sigmoid"}, 2),
    "a choice of truth": ("'str', config = 'gate', map = { true = 'on' }", {"gate": True}, "on"),
    "any other choice": ("'u32', config = 'gate', map = { a = 1, '*' = 9 }", {"gate": "b"}, 9),
    "one for all layers": ("'[u32]', config = 'width'", {}, [48] * 4),
    "one for each layer": ("'[u32]', config = 'a'", {"a": [1, 2, 3, 4]}, [1, 2, 3, 4]),
    "a choice for each layer": ("'[u32]', config = 'a', map = { x = 1, y = 2 }", {"a": list("xyxy")}, [1, 2, 1, 2]),
    "a list that is one number": ("'u32', config = 'a'", {"a": [6, 6, 6, 6]}, 6),
    "by kind": ("'[u32]', by_kind = { dense = 'width', other = 0, every = 'a' }", {"a": [1, 2, 3, 4]}, [48, 2, 0, 4]),
    "layers of a kind": ("'u32', layers_of = 'every'", {}, 2),
    "the length of a list": ("'u32', length = ['a', 'types']", {}, 4),
    "the length of a text": ("'u32', length = ['a', 'types']", {"a": "MEM"}, 3),
    "what layers of a type have": (
        "'u32', config = 'by_layer_type.full.head_dim'",
        {"layer_types": ["full", "sliding"] * 2, "per_layer_config": {"0": {"head_dim": 9}, "2": {"head_dim": 9}}},
        9,
    ),
}


@pytest.mark.parametrize("case", FIELDS)
def test_fields_mean_what_they_say(case: str, tmp_path: Path) -> None:
    text, config, expected = FIELDS[case]
    config = {"step": 2, "these": [], "types": list("LLLL"), **config}
    read = settings(tmp_path, config, KINDS, f"x = {{ type = {text} }}")
    entry = next(entry for entry in metadata_entries(read, "config.json") if entry.key == "toy.x")
    found = entry.value()
    assert (found.tolist() if isinstance(expected, list) else found) == expected


def test_kinds_are_found_by_every_rule(tmp_path: Path) -> None:
    config = {"first": 1, "step": 2, "these": [0, 3], "types": ["linear", "full", "L", "full"], "norm": True}
    read = settings(tmp_path, config, KINDS)
    layers = {kind: [i for i, kinds in enumerate(read.kinds) if kind in kinds] for kind in read.converter.kinds}
    assert layers == {
        "dense": [0], "every": [1, 3], "other": [2], "named": [0, 3], "linear": [0, 2], "gated": [2],
        "normed": [0, 1, 2, 3],
    }  # fmt: skip


REFUSED: dict[str, tuple[str, str, dict[str, Any], type[EdgepruneError], str]] = {
    "no value": ("", "x = { type = 'u32', config = 'a' }", {}, BadFile, "has none of: a"),
    "operands that are absent": ("", "x = { type = 'u32', sum = ['a', 'b'] }", {}, BadFile, "has none of: a, b"),
    "operands that are texts": ("", "x = { type = 'u32', sum = ['a'] }", {"a": "b"}, BadFile, "not all numbers"),
    "a quotient by zero": ("", "x = { type = 'u32', quotient = ['width', 'a'] }", {"a": 0}, BadFile, "a is zero"),
    "an unknown choice": (
        "",
        "x = { type = 'u32', config = 'a', map = { b = 1 } }",
        {"a": "c"},
        Unsupported,
        "a = 'c' has no place",
    ),
    "layers that differ": ("", "x = { type = 'u32', config = 'a' }", {"a": [1, 2]}, Unsupported, "differs between"),
    "too short an array": (
        "",
        "x = { type = '[u32]', config = 'a' }",
        {"a": [1]},
        BadFile,
        "1 elements for 4 layers",
    ),
    "a size that is none": ("[sizes]\na = { config = 'a' }", "", {"a": "b"}, BadFile, "'b' is not a size"),
    "a kind below a text": ("[kinds]\nd = { below = 'a' }", "", {"a": "b"}, BadFile, "not a number of layers"),
    "every zeroth layer": ("[kinds]\nd = { every = 'a' }", "", {"a": 0}, BadFile, "not a number of layers"),
    "members of a number": ("[kinds]\nd = { members = 'a' }", "", {"a": 3}, BadFile, "is not a list"),
    "a list that ends": ("[kinds]\nd = { list = 'a', equals = ['x'] }", "", {"a": ["x"]}, BadFile, "ends before"),
    "another value": ("[require]\na = { one_of = [1, 2] }", "", {"a": 3}, Unsupported, "a = 3; .* assumes 1 or 2"),
    "an absent value": ("[require]\na = true", "", {}, Unsupported, "a = None; .* assumes True"),
    "a wrong default": ("[require]\na = { is = 1, default = 2 }", "", {}, Unsupported, "a = 2; .* assumes 1"),
    "another's value": ("[require]\na = { same_as = 'width' }", "", {"a": 3}, Unsupported, "a = 3; .* assumes 48"),
    "a length of a number": ("", "x = { type = 'u32', length = ['width'] }", {}, BadFile, "has none of: width"),
    "layers of a type that differ": (
        "",
        "",
        {"layer_types": ["full", "sliding"] * 2, "per_layer_config": {"0": {"head_dim": 9}}},
        Unsupported,
        "layers of the type full differ in per_layer_config",
    ),
    "a key that speaks": (
        "[require]\na = { is = 1, unless = 'b' }",
        "",
        {"a": 3},
        Unsupported,
        "a = 3; .* assumes 1",
    ),
    "off the beat": ("[require]\na = { cycle = [1, 0] }", "", {"a": [1, 1]}, Unsupported, r"assumes \[1, 0\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configuration_without_a_meaning_is_refused(case: str, tmp_path: Path) -> None:
    top, metadata, config, kind, cause = REFUSED[case]
    with pytest.raises(kind, match=cause) as refusal:
        metadata_entries(settings(tmp_path, config, top, metadata), "config.json")
    assert "\n" not in refusal.value.cause


ALLOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "one of two": ("a = { one_of = [1, 2] }", {"a": 2}),
    "absent is off": ("a = false", {}),
    "absent is its default": ("a = { is = 1, default = 1 }", {}),
    "in a table": ("'a.b' = 3", {"a": {"b": 3}}),
    "the same": ("a = { same_as = 'width' }", {"a": 48}),
    "on the beat": ("a = { cycle = [1, 1, 0] }", {"a": [1, 1, 0, 1]}),
    "a key that says nothing": ("a = { is = 1, unless = 'width' }", {"a": 3}),
    "no beat": ("a = { cycle = [1, 0] }", {}),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_configuration_that_is_as_required_passes(case: str, tmp_path: Path) -> None:
    text, config = ALLOWED[case]
    assert settings(tmp_path, config, f"[require]\n{text}").layers == 4


def test_prefix_is_the_first_that_tensors_have(tmp_path: Path) -> None:
    top = 'prefixes = ["language.model.", "model."]\nnested = "text_config"'
    read = settings(tmp_path, {"text_config": {"num_experts": 3}}, top)
    assert prefix_of(converter(tmp_path, top), open_checkpoint(tmp_path)) == "model."
    assert read.converter.tensors["token_embd.weight"][0].name == "model.embed_tokens.weight"
    assert (read.experts, read.layers) == (3, 4)  # of the inner table, and of the outer one


def test_aliases_lead_to_the_same_converter() -> None:
    assert converter_for("llama4_text") == converter_for("llama4")


# The user's own files in the configuration folder win over the shipped ones.


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder of converters, empty."""
    for name in ("XDG_CONFIG_HOME", "APPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "config"))
    folder = user_folder("converters")
    folder.mkdir(parents=True)
    return folder


def copied(own: Path, shipped: str, name: str, *further: str) -> Path:
    """A copy of the converter ``shipped`` as the user's own of that ``name``, with lines in front."""
    text = (data_folder("converters") / f"{shipped}.toml").read_text(encoding="utf-8")
    path = own / f"{name}.toml"
    path.write_text("\n".join((*further, text.replace(f'name = "{shipped}"', f'name = "{name}"', 1))))
    return path


def test_own_converters_win_over_shipped_ones(own: Path) -> None:
    assert own_converter("olmoe") is None
    path = copied(own, "olmoe", "olmoe", 'aliases = ["llama4_text", "mine"]')
    assert own_converter("olmoe") == path and converter_for("olmoe").aliases == ("llama4_text", "mine")
    assert converter_for("mine").name == converter_for("llama4_text").name == "olmoe"
    assert converter_for("llama4").name == "llama4" and own_converter("llama4") is None
    path.write_text("name = ")
    with pytest.raises(BadFile, match=r"cannot read .*olmoe\.toml"):
        converter_for("mixtral_of_mine")


def test_family_is_added_by_one_file(own: Path, toy_checkpoint: toys.Maker, tmp_path: Path) -> None:
    """As the README says: the file's path is in the refusal, and what is converted is made again when it changes."""
    folder = Path(shutil.copytree(toy_checkpoint("olmoe"), tmp_path / "model"))
    toys.change_json(folder / "config.json", model_type="my_moe")
    refused = run_edgeprune("convert", "model", "my.gguf", cwd=tmp_path)
    assert refused.returncode == 1 and f"describe another in {own / 'my_moe.toml'}" in refused.stderr
    path = copied(own, "olmoe", "my_moe")
    done = run_edgeprune("convert", "model", "my.gguf", cwd=tmp_path)
    assert done.returncode == 0 and f"converter: {path}" in done.stderr
    convert(toy_checkpoint("olmoe"), tmp_path / "olmoe.gguf")
    names = ("general.name", SOURCE_KEY)
    first, second = (GgufFile(tmp_path / f"{name}.gguf") for name in ("my", "olmoe"))
    assert [entry.raw for key, entry in first.entries.items() if key not in names] == [
        entry.raw for key, entry in second.entries.items() if key not in names
    ]
    assert (tmp_path / "my.gguf").read_bytes()[first.data_offset :] == second.path.read_bytes()[second.data_offset :]
    before = open_checkpoint(folder).origin()
    assert before == first.get(SOURCE_KEY)
    path.write_text(path.read_text() + "# changed")
    assert open_checkpoint(folder).origin() != before
    told = json.loads(run_edgeprune("inspect", "model", "--json", cwd=tmp_path).stdout)
    assert ["converter", str(path)] in told["facts"]


def test_tensors_that_no_converter_knows_are_left_out_as_the_hint_says(
    own: Path, toy_checkpoint: toys.Maker, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(toy_checkpoint("olmoe"), tmp_path / "model"))
    further = {f"model.new.{n}.weight": torch.ones(4) for n in range(4)}
    save_file({**load_file(folder / SINGLE), **further}, folder / SINGLE)
    cause = r"4 tensors that olmoe does not: model\.new\.0.*, model\.new\.2\.weight, \.\.\."
    with pytest.raises(Unsupported, match=cause) as no:
        convert(folder, tmp_path / "out.gguf")
    shipped = data_folder("converters") / "olmoe.toml"
    assert f"under [left_out] in {own / 'olmoe.toml'}, a copy of {shipped}" in no.value.hint
    copy = copied(own, "olmoe", "olmoe")
    with pytest.raises(Unsupported, match="4 tensors") as no:
        convert(folder, tmp_path / "out.gguf")
    assert f"under [left_out] in {copy} (README" in no.value.hint
    with copy.open("a") as stream:
        stream.write('\n[left_out]\n"what is new" = ["model.new.*"]\n')
    assert convert(folder, tmp_path / "out.gguf") == ["left out: what is new, 4 tensors of 64 B"]


def test_family_that_llama_cpp_computes_wrongly_is_refused_with_the_reason() -> None:
    with pytest.raises(Unsupported, match=r"phimoe models wrongly: it renormalises .* 0\.46 nats") as refusal:
        converter_for("phimoe")
    assert "\n" not in refusal.value.cause and "GGUF" in refusal.value.hint


def test_shipped_converters_use_every_transform() -> None:
    """What no converter names is not tested by any model, and not needed."""
    used = {
        source.transform
        for path in shipped_converters()
        for sources in load_converter(path).tensors.values()
        for source in sources
    }
    assert used == set(TRANSFORMS)


STACK, MATRIX = (4, 8, 12), (24, 12)
SHAPES: dict[str, tuple[int, ...]] = {
    "keep": STACK, "vector": (1, 12), "stack_experts": MATRIX, "gate_of_gate_up": STACK, "up_of_gate_up": STACK,
    "gate_of_columns": STACK, "up_of_columns": STACK, "even_columns_turned": STACK, "odd_columns_turned": STACK,
    "turned": STACK, "even_rows": STACK, "odd_rows": STACK, "even_columns": (4, 12), "odd_columns": (4, 12),
    "permute_rope_query": MATRIX, "permute_rope_key": MATRIX, "key_of_latent": MATRIX, "value_of_latent": MATRIX,
    "upper_rows": MATRIX, "lower_rows": MATRIX, "plus_one": (12,), "kernel": (24, 1, 4),
    "column": (12,), "decay_rates": (12,), "decay_rates_column": (12,), "by_state_group": (12,),
    "qkv_of_qkvz": (52, 3), "gate_of_qkvz": (52, 3), "tile_value_heads": MATRIX, "tile_value_heads_of_qkv": (34, 3),
    "tile_value_heads_of_kernel": (34, 1, 4), "tile_value_columns": (3, 24), "tiled_decay_rates": (6,),
}  # fmt: skip
# Of a linear attention: two key heads of 4, six value heads of 3.
LINEAR = {"linear_key_heads": 2, "linear_value_heads": 6, "linear_key_width": 4, "linear_value_width": 3}


@pytest.mark.parametrize("name", SHAPES)
def test_transform_makes_the_shape_that_it_promises(name: str) -> None:
    """And nothing is lost or made up: each value of the source appears at most once."""
    shape = SHAPES[name]
    sizes = Sizes(query=4, key=2, named={"nope": 4, "value": 2, "state_groups": 3, **LINEAR})
    weight = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    count = 3 if name == "stack_experts" else 1
    pieces = list(TRANSFORMS[name].apply(weight, sizes)) * count
    promised = TRANSFORMS[name].shape((shape,) * count, sizes)
    joined = torch.cat([piece.reshape(-1) for piece in pieces])
    assert joined.numel() == torch.Size(promised).numel()
    assert joined.unique().numel() * count == joined.numel()
    assert all(tuple(piece.shape) == tuple(promised[-piece.dim() :]) for piece in pieces)
