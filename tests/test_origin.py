"""Where a model comes from: what its GGUF, its card and its generation configuration say; what is not believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import toys

from edgeprune.errors import BadFile
from edgeprune.model.gguf import GgufFile, make_entry
from edgeprune.share.origin import (
    Licence,
    Origin,
    is_repository,
    make_licence,
    origin_of_checkpoint,
    origin_of_gguf,
    read_origin,
)


def gguf_with(folder: Path, **metadata: tuple[str, Any]) -> GgufFile:
    entries = [
        make_entry(f"general.{key.replace('__', '.')}", kind, value) for key, (kind, value) in metadata.items()
    ]
    architecture = make_entry("general.architecture", "str", "toy")
    return GgufFile(toys.write_gguf(folder / "model.gguf", [architecture, *entries], []))


def test_metadata_as_llama_cpp_converters_write_them(tmp_path: Path) -> None:
    file = gguf_with(
        tmp_path,
        license=("str", "other"),
        license__name=("str", "terms"),
        license__link=("str", "https://huggingface.co/org/model/blob/main/LICENSE"),
        languages=("[str]", ["en", "zh"]),
        base_model__count=("u32", 2),
        base_model__0__repo_url=("str", "https://huggingface.co/org/first"),
        base_model__1__repo_url=("str", "https://hf.co/org/second/"),
        sampling__temp=("f32", 0.5),
        sampling__top_k=("i32", 20),
    )
    assert origin_of_gguf(file) == Origin(
        ("org/first", "org/second"),
        Licence("other", "terms", "https://huggingface.co/org/model/blob/main/LICENSE"),
        ("en", "zh"),
        {"--temp": 0.5, "--top-k": 20.0},
    )


def test_the_licence_of_the_demo_is_known(tmp_path: Path) -> None:
    assert read_origin(gguf_with(tmp_path), "demo").licence == Licence("apache-2.0")


def test_the_source_goes_before_what_it_was_made_from(tmp_path: Path) -> None:
    file = gguf_with(
        tmp_path,
        source__repo_url=("str", "https://huggingface.co/org/source"),
        base_model__count=("u32", 1),
        base_model__0__repo_url=("str", "https://huggingface.co/org/grandparent"),
    )
    assert origin_of_gguf(file).base_models == ("org/source",)


@pytest.mark.parametrize(
    "metadata",
    [
        {"license": ("u32", 7)},
        {"license": ("str", "mit\ntags: [x]")},
        {"base_model__count": ("str", "many")},
        {"base_model__count": ("u32", 1), "base_model__0__repo_url": ("str", "https://example.org/a/b")},
        {"base_model__count": ("u32", 1), "base_model__0__repo_url": ("str", "../../etc")},
        {"languages": ("str", "[x](javascript:1)")},
        {"sampling__temp": ("f32", float("nan"))},
        {"sampling__temp": ("str", "0.5; rm")},
    ],
    ids=["number", "lines", "count", "elsewhere", "way out", "link", "not a number", "text"],
)
def test_what_makes_no_sense_says_nothing(metadata: dict[str, tuple[str, Any]], tmp_path: Path) -> None:
    assert origin_of_gguf(gguf_with(tmp_path, **metadata)) == Origin()


def test_a_checkpoint_in_the_hubs_cache_knows_its_repository(tmp_path: Path) -> None:
    folder = tmp_path / "models--Org--Model-7x1B" / "snapshots" / "0a1b"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage:\n- fr\npipeline_tag: image-text-to-text\nbase_model: Org/Older\n---\n"
    )
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6, "top_p": 0.95}')
    found = origin_of_checkpoint(folder)
    assert found.base_models == ("Org/Model-7x1B",)
    assert (found.licence, found.languages, found.pipeline) == (Licence("apache-2.0"), ("fr",), "image-text-to-text")
    assert found.sampler_words == ["--temp", "0.6", "--top-p", "0.95"]
    # What the checkpoint says goes before what its GGUF says, which is asked where it is silent.
    file = gguf_with(tmp_path, license=("str", "mit"), sampling__temp=("f32", 1.0))
    assert read_origin(file, str(folder)) == found
    assert read_origin(file, str(tmp_path / "gone")).licence == Licence("mit")
    assert read_origin(file, "demo").licence == Licence("mit")


def test_a_source_on_the_hub_is_the_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    commit = "0123456789" * 4
    repository = tmp_path / "cache" / "models--Org--Model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "generation_config.json").write_text('{"temperature": 0.7}')
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    file = gguf_with(tmp_path, license=("str", "mit"))
    assert read_origin(file, "Org/Model") == Origin(("Org/Model",), Licence("mit"), (), {"--temp": 0.7})
    assert read_origin(file, "Org/Other@next") == Origin(("Org/Other",), Licence("mit"))
    # A GGUF on the Hub was made from something, and may say so.
    assert read_origin(file, "Org/Model-GGUF:Q4_K_M").base_models == ("Org/Model-GGUF",)
    known = gguf_with(
        tmp_path, base_model__count=("u32", 1), base_model__0__repo_url=("str", "https://huggingface.co/Org/Model")
    )
    assert read_origin(known, "Org/Model-GGUF:Q4_K_M").base_models == ("Org/Model",)


def test_numbers_that_no_float_holds_are_left_out(tmp_path: Path) -> None:
    for number in (10**400, float("inf"), float("nan")):
        (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": 0.9, "top_k": number}))
        assert origin_of_checkpoint(tmp_path).sampler == {"--top-p": 0.9}


def test_a_generation_without_sampling_recommends_no_sampler(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')
    assert origin_of_checkpoint(tmp_path) == Origin()


@pytest.mark.parametrize(
    "front",
    ["a: [", "- a\n- b", "!!python/object/apply:os.system ['true']", "[" * 5000],
    ids=["cut off", "a list", "code", "deep"],
)
def test_a_broken_card_is_explained(front: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    with pytest.raises(BadFile, match=r"cannot read the metadata of .*README\.md"):
        origin_of_checkpoint(tmp_path)


def test_licences() -> None:
    assert make_licence("MIT") == Licence("mit")
    assert make_licence("no licence at all") is None and make_licence(None) is None
    assert make_licence("other", "x", "javascript:alert(1)") == Licence("other", "x", "")
    assert Licence("cc-by-nc-nd-4.0").forbids_derivatives and not Licence("cc-by-nc-sa-4.0").forbids_derivatives
    assert str(Licence("other", "terms", "https://a.b")) == "other (terms, https://a.b)"


@pytest.mark.parametrize(
    ("name", "sound"),
    [
        ("org/name", True), ("Org-1/Na.me_2", True), ("name", False), ("a/b/c", False), ("org/", False),
        ("../name", False), ("org/..", False), ("org/a--b", False), ("org/a b", False),
    ],
)  # fmt: skip
def test_names_of_repositories(name: str, sound: bool) -> None:
    assert is_repository(name) == sound
