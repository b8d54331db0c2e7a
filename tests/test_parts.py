"""Models in several files: read as one, written in parts, and refused when the parts do not belong together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import toys
from runs import Fit, read, run_edgeprune

from edgeprune.errors import BadFile
from edgeprune.inspection import inspect_model
from edgeprune.measure import child
from edgeprune.measure.launch import Launch
from edgeprune.model.architecture import read_architecture
from edgeprune.model.gguf import GgufFile, make_entry
from edgeprune.model.layout import layout
from edgeprune.model.parts import PREFIX, all_parts, first_part, numbered, part_name, stem

pytest_plugins = ("demo_fixtures", "hub_fixtures")

PART_BYTES = 300_000
SMALL = {"width": 64, "expert_width": 64, "experts": 4, "vocabulary": 600}


def split(source: Path, prefix: Path, part_bytes: int = PART_BYTES) -> list[Path]:
    """The model ``source`` in parts beside ``prefix``."""
    file = GgufFile(source)
    architecture = read_architecture(file)
    made = layout(file, architecture, architecture.experts, {}, [], part_bytes)
    names, paths = iter(file.tensors.values()), []
    for number, part in enumerate(made.parts):
        paths.append(prefix.with_name(part_name(prefix.name, number, len(made.parts))))
        content = part.header
        for _ in range(part.tensors):
            raw = file.raw(next(names).name).tobytes()
            content += raw + bytes(-len(raw) % made.alignment)
        assert len(content) == part.nbytes
        paths[-1].write_bytes(content)
    assert sum(path.stat().st_size for path in paths) == made.nbytes
    return paths


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.synthetic_gguf(tmp_path_factory.mktemp("whole") / "whole.gguf", "deepseek2", layers=3, **SMALL)


@pytest.fixture
def parts(whole: Path, tmp_path: Path) -> list[Path]:
    return split(whole, tmp_path / "toy")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a-00001-of-00003.gguf", ("a", 0, 3)), ("a-00003-of-00003.gguf", ("a", 2, 3)),
        ("a-b-00001-of-00001.gguf", ("a-b", 0, 1)), ("a-00004-of-00003.gguf", None), ("a-00000-of-00003.gguf", None),
        ("a-1-of-3.gguf", None), ("-00001-of-00003.gguf", None), ("a-00001-of-00003.bin", None), ("a.gguf", None),
    ],
)  # fmt: skip
def test_names_of_parts(name: str, expected: tuple[str, int, int] | None) -> None:
    assert numbered(name) == expected
    if expected is not None:
        assert part_name(*expected) == name and stem(Path(name)) == expected[0]
        assert all_parts(Path(name))[expected[1]] == Path(name) and len(all_parts(Path(name))) == expected[2]


def test_any_part_opens_the_whole_model(whole: Path, parts: list[Path]) -> None:
    assert len(parts) >= 3 and all(path.stat().st_size <= PART_BYTES for path in parts)
    alone = GgufFile(whole)
    for path in parts:
        file = GgufFile(path)
        assert file.path == parts[0] == first_part(path) and list(file.paths) == parts
        assert list(file.tensors) == list(alone.tensors)
        assert all(file.raw(name).tobytes() == alone.raw(name).tobytes() for name in alone.tensors)
        assert file.size == sum(part.stat().st_size for part in parts)
        assert {info.part for info in file.tensors.values()} == set(range(len(parts)))
        for name in file.tensors:
            file.release(name)
    described, expected = read_architecture(GgufFile(parts[1])), read_architecture(alone)
    assert (described.tensors, described.allowed_counts()) == (expected.tensors, expected.allowed_counts())
    assert inspect_model(str(parts[2])).roles == inspect_model(str(whole)).roles


def test_a_file_of_a_split_model_knows_nothing_of_the_split(whole: Path, parts: list[Path]) -> None:
    file = GgufFile(parts[0])
    again = layout(file, read_architecture(file), 4, {}, [])
    alone = GgufFile(whole)
    assert again.header == layout(alone, read_architecture(alone), 4, {}, []).header


def test_fingerprint_sees_every_part(parts: list[Path], tmp_path: Path) -> None:
    prints = {GgufFile(parts[0]).fingerprint()}
    for path in parts:
        changed = bytearray(path.read_bytes())
        changed[-1] ^= 1
        path.write_bytes(changed)
        prints.add(GgufFile(parts[0]).fingerprint())
    assert len(prints) == len(parts) + 1


def test_llama_cpp_runs_the_parts(parts: list[Path]) -> None:
    arguments = {"model": str(parts[0]), "launch": Launch(threads=1).to_json(), "repeats": 1}
    arguments |= {"prompt_tokens": 8, "generated_tokens": 1}
    assert child.call("edgeprune.measure.benchmark:benchmark", arguments)["finite"]


def rewritten(path: Path, **changes: int) -> None:
    """The part ``path`` with other numbers about the split."""
    forms = {"no": "u16", "count": "u16", "tensors_count": "i32"}
    file = first_only(path)
    entries = dict(file)
    for key, value in changes.items():
        name = PREFIX + key.replace("_", ".")
        entries[name] = make_entry(name, forms[key], value)
    raw = path.read_bytes()
    for name, entry in entries.items():
        if file[name].raw != entry.raw:
            at = raw.index(name.encode()) + len(name)
            raw = raw[:at] + entry.raw + raw[at + len(entry.raw) :]
    path.write_bytes(raw)


def first_only(path: Path) -> dict[str, object]:
    from edgeprune.model.headers import read_header

    return dict(read_header(path.read_bytes(), path).entries)


WRONG: dict[str, tuple[Callable[[list[Path]], object], str]] = {
    "a part is missing": (lambda parts: parts[1].unlink(), r"toy-00002-of-\d+.gguf is missing: 1 of the model's"),
    "the first part is missing": (lambda parts: parts[0].unlink(), r"toy-00001-of-\d+.gguf is missing"),
    "a part is a copy of another": (lambda parts: shutil.copy(parts[2], parts[1]), "is part 3 by its metadata"),
    "a part of another split": (
        lambda parts: rewritten(parts[1], count=9),
        r"of another model than .*split.count is 9",
    ),
    "a part of a model with more tensors": (
        lambda parts: rewritten(parts[1], tensors_count=7),
        r"of another model than .*split.tensors.count is 7",
    ),
    "a tensor twice": (
        lambda parts: (shutil.copy(parts[2], parts[1]), rewritten(parts[1], no=1)),
        "which an earlier part has too",
    ),
    "not all tensors": (
        lambda parts: [rewritten(path, tensors_count=99) for path in parts],
        "tensors, the metadata say 99",
    ),
    "a part is cut off": (lambda parts: parts[1].write_bytes(parts[1].read_bytes()[:-999]), "is truncated"),
    "a part is something else": (lambda parts: parts[1].write_bytes(b"PK\3\4" * 99), "is not a GGUF file"),
    "a part is empty": (lambda parts: parts[1].write_bytes(b""), "too few"),
}


@pytest.mark.parametrize("case", WRONG)
def test_parts_that_do_not_belong_together_are_refused(case: str, parts: list[Path]) -> None:
    damage, cause = WRONG[case]
    damage(parts)
    with pytest.raises(BadFile, match=cause) as refusal:
        GgufFile(parts[-1])
    assert "\n" not in refusal.value.cause


def test_part_under_another_name_is_refused(parts: list[Path]) -> None:
    renamed = parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(BadFile, match="which its name does not say") as refusal:
        GgufFile(renamed)
    assert f"MODEL-00001-of-{len(parts):05d}.gguf" in refusal.value.hint


def test_name_of_a_part_alone_makes_no_split(whole: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(whole, tmp_path / "a-00001-of-00002.gguf"))
    assert GgufFile(path).paths == (path,)


def test_parts_are_as_large_as_asked_and_hold_everything_in_order(whole: Path) -> None:
    file = GgufFile(whole)
    architecture = read_architecture(file)
    for part_bytes in (50_000, 123_457, 10**6):
        made = layout(file, architecture, 4, {}, [], part_bytes)
        largest = max(tensor.nbytes for tensor in made.tensors)
        assert sum(part.tensors for part in made.parts) == len(made.tensors)
        for part in made.parts:
            assert part.nbytes <= part_bytes or part.tensors == 1 or largest + len(made.header) > part_bytes
    assert len(layout(file, architecture, 4, {}, [], 10**9).parts) == 1
    assert layout(file, architecture, 4, {}, [], 10**9).header == layout(file, architecture, 4, {}, []).header


def test_split_on_the_hub_is_inspected_as_a_local_one(hub: object, parts: list[Path]) -> None:
    import hub_files

    assert isinstance(hub, hub_files.Hub)
    hub.add("maker/toy", {f"Q8/{path.name}": path for path in parts})
    found, here = inspect_model("maker/toy:Q8"), inspect_model(str(parts[0]))
    assert (found.roles, found.nbytes) == (here.roles, here.nbytes)
    for there, local in zip(
        found.fits, here.fits, strict=True
    ):  # what a vocabulary takes that was not read is estimated
        assert replace(there, beside_bytes=0) == replace(local, beside_bytes=0)
        assert abs(there.beside_bytes - local.beside_bytes) < 32 << 20
    assert dict(found.facts)["files"] == f"{len(parts)} parts"


def test_split_source_is_fitted_into_parts(tiny_fit: Fit, small_text: Path, tmp_path: Path) -> None:
    """Every command on a split model, and a result in parts: the same plan as for one file, to the byte."""
    source = split(tiny_fit.folder / "source.gguf", tmp_path / "toy")
    wishes = ("--file-size", "500kB", "--text", small_text, "--no-heal", "-o", tmp_path / "run")
    done = run_edgeprune("fit", source[1], *wishes, "--split", "200kB")
    assert done.returncode == 0, done.stderr
    assert ".gguf" in done.stdout
    build, plan = read(tmp_path / "run" / "build.json"), read(tmp_path / "run" / "plan.json")
    made = GgufFile(tmp_path / "run" / build["path"])
    assert len(made.paths) >= 3 and made.size == build["nbytes"] == plan["predicted"]["file_bytes"] <= 500_000
    assert all(path.stat().st_size <= 200_000 for path in made.paths)
    again = run_edgeprune("build", source[0], *wishes, "--split", "200kB")
    assert (again.returncode, again.stderr) == (0, "")  # nothing is made again
    made.paths[1].unlink()
    assert run_edgeprune("build", source[0], *wishes, "--split", "200kB").returncode == 0
    assert GgufFile(made.path).size == build["nbytes"]
    joined = run_edgeprune("build", source[0], *wishes)
    assert joined.returncode == 0 and "is replaced by" in joined.stderr
    left = [
        path.name for path in (tmp_path / "run").glob("*.gguf") if path.name not in ("source.gguf", "imatrix.gguf")
    ]
    assert len(left) == 1 and numbered(left[0]) is None
