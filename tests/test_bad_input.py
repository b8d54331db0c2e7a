"""Bad input through the real command: the exit code, the first line of the message, the way out, and nothing left."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import toys
from runs import Fit, run_edgeprune

from edgeprune.model.gguf import Entry, GgufFile, TensorShape, make_entry

pytest_plugins = ("demo_fixtures",)

SIZE = ("--file-size", "5MB")
DEVICE = ("--device", "cpu-16gb")  # quicker than a size: nothing has to be learnt of this machine
SMALL = {"experts": 4, "width": 64, "expert_width": 64}


@dataclass(frozen=True)
class Workshop:
    """Where bad models are made from good ones.

    Attributes:
        folder: empty, of the test.
        gguf: a good GGUF.
        checkpoint: a good checkpoint.
    """

    folder: Path
    gguf: Path
    checkpoint: Path

    def damaged(self, change: Callable[[bytes], bytes]) -> Path:
        """The good GGUF with other bytes."""
        path = self.folder / "model.gguf"
        path.write_bytes(change(self.gguf.read_bytes()))
        return path

    def poisoned(self, name: str) -> Path:
        """The good GGUF with one value of a tensor not a number."""
        file = GgufFile(self.gguf)
        offset = file.tensors[name].offset
        nan = b"\x00\x00\xc0\x7f"
        return self.damaged(lambda data: data[:offset] + nan + data[offset + 4 :])

    def copied(self, change: Callable[[Path], Any]) -> Path:
        """The good checkpoint as a folder ``model``, changed."""
        path = self.folder / "model"
        shutil.copytree(self.checkpoint, path)
        change(path)
        return path

    def renamed(self, arch: str) -> Path:
        """The good GGUF with the name of another architecture."""
        file = GgufFile(self.gguf)
        entries = [
            Entry(key.replace("qwen3moe.", f"{arch}."), entry.kind, entry.element, entry.count, entry.raw)
            for key, entry in file.entries.items()
            if key != "general.architecture"
        ]
        entries.append(make_entry("general.architecture", "str", arch))
        tensors = [(TensorShape(t.name, t.shape, t.type), file.raw(t.name)) for t in file.tensors.values()]
        return toys.write_gguf(self.folder / "model.gguf", entries, tensors)

    def synthetic(self, arch: str = "qwen3moe", *extra: tuple[str, str, Any]) -> Path:
        return toys.synthetic_gguf(self.folder / "model.gguf", arch, extra=extra, **SMALL)


@pytest.fixture(scope="module")
def good_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.synthetic_gguf(tmp_path_factory.mktemp("good") / "good.gguf", **SMALL)


@pytest.fixture
def workshop(good_gguf: Path, tiny_checkpoint: Path, tmp_path: Path) -> Workshop:
    return Workshop(tmp_path, good_gguf, tiny_checkpoint)


def first_lines(done: subprocess.CompletedProcess[str], code: int) -> tuple[str, str]:
    """The first line on stderr and the hint, or "", of a command that failed with ``code`` and an explanation."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("the model fits as it is")]
    hints = [line.removeprefix("hint: ") for line in lines if line.startswith("hint: ")]
    assert len(hints) <= 1
    return lines[0], hints[0] if hints else ""


def cut(path: Path, nbytes: int) -> None:
    os.truncate(path, path.stat().st_size + nbytes if nbytes < 0 else nbytes)


def without_tensor(folder: Path, part: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in sorted(tensors) if part in name)]
    save_file(tensors, folder / "model.safetensors")


def with_nan(folder: Path, part: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[next(name for name in sorted(tensors) if part in name)].view(-1)[77] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def without_experts(folder: Path) -> None:
    """Make a dense model of the checkpoint."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "experts" not in n}, folder / "model.safetensors")
    keys = ("num_experts", "num_local_experts", "num_experts_per_tok")
    toys.change_json(folder / "config.json", model_type="llama", **dict.fromkeys(keys, ...))


def sharded(folder: Path) -> Path:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / shard)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")
    weight_map = {name: shard for shard, own in parts.items() for name in own}
    toys.change_json(folder / "model.safetensors.index.json", weight_map=weight_map)
    (folder / "b.safetensors").unlink()
    return folder


MODELS: dict[str, tuple[Callable[[Workshop], Path], str, str]] = {
    "a dense GGUF": (
        lambda shop: shop.synthetic("llama"),
        "model.gguf is a dense llama model: it has no experts to choose from",
        "llama-quantize",
    ),
    "a GGUF cut off in its data": (
        lambda shop: shop.damaged(lambda data: data[: len(data) // 2]),
        "{path} is truncated: tensor blk.",
        "cut off; get the file again",
    ),
    "a GGUF cut off in its header": (
        lambda shop: shop.damaged(lambda data: data[:3000]),
        "{path}: truncated or corrupt GGUF: ",
        "",
    ),
    "random bytes": (
        lambda shop: shop.damaged(lambda data: random.Random(1).randbytes(100_000)),
        "{path} is not a GGUF file: it begins with b'",
        "",
    ),
    "random bytes after the magic": (
        lambda shop: shop.damaged(lambda data: data[:8] + random.Random(2).randbytes(100_000)),
        "{path}: truncated or corrupt GGUF: claims ",
        "",
    ),
    "an empty file": (
        lambda shop: shop.damaged(lambda data: b""),
        "{path}: 0 bytes are too few for a GGUF file",
        "",
    ),
    "one part of a split GGUF": (
        lambda shop: shop.synthetic("qwen3moe", ("split.count", "u16", 3)),
        "{path} is one of 3 parts by its metadata, which its name does not say",
        "MODEL-00001-of-00003.gguf",
    ),
    "metadata on which llama.cpp would abort": (
        lambda shop: shop.synthetic("qwen3moe", ("expert_used_count", "u32", 9)),
        "{path}: impossible metadata: 2 layers, 4 experts, 9 used per token",
        "",
    ),
    "metadata on which llama.cpp does crash": (
        lambda shop: shop.synthetic("qwen3moe", ("expert_used_count", "[u32]", [2, 0])),
        "the child process for price_each died: llama.cpp crashed with a memory fault",
        "damaged",
    ),
    "an architecture that llama.cpp does not know": (
        lambda shop: shop.renamed("nonesuch"),
        "llama.cpp cannot load toy qwen3moe",
        "",
    ),
    "a GGUF with NaN in a norm": (
        lambda shop: shop.poisoned("blk.1.ffn_norm.weight"),
        "{path}: tensor blk.1.ffn_norm.weight holds NaN or infinity",
        "damaged",
    ),
    "a missing path": (
        lambda shop: shop.folder / "nowhere.gguf",
        "no model at {path}",
        "give `demo`, a checkpoint folder, a GGUF file, or a model on the Hub: ORG/NAME, ORG/NAME:Q4_K_M",
    ),
    "a folder without a model": (
        lambda shop: shop.folder,
        "{path} holds no config.json; it is no Hugging Face checkpoint",
        "",
    ),
    "a checkpoint with a missing shard": (
        lambda shop: shop.copied(sharded),
        "{path} lacks b.safetensors, one of its 2 files of weights",
        "incomplete",
    ),
    "a truncated safetensors": (
        lambda shop: shop.copied(lambda path: cut(path / "model.safetensors", -1000)),
        "{path}/model.safetensors is truncated: its header describes ",
        "cut off",
    ),
    "a safetensors cut off in its header": (
        lambda shop: shop.copied(lambda path: cut(path / "model.safetensors", 500)),
        "{path}/model.safetensors is not a safetensors file, or is truncated (500 bytes)",
        "again",
    ),
    "weights as pickles": (
        lambda shop: shop.copied(lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin")),
        "{path} has its weights as Python pickles, which can run code when they are opened",
        "safe_serialization=True",
    ),
    "a configuration that is no JSON": (
        lambda shop: shop.copied(lambda path: (path / "config.json").write_text("{")),
        "cannot read {path}/config.json: ",
        "",
    ),
    "an unknown model_type": (
        lambda shop: shop.copied(lambda path: toys.change_json(path / "config.json", model_type="gpt_neox")),
        "no converter for checkpoints of type 'gpt_neox'",
        "mixtral, ",
    ),
    "a dense checkpoint": (
        lambda shop: shop.copied(without_experts),
        "{path} is a dense llama model: it has no experts to choose from",
        "llama-quantize",
    ),
    "a router that llama.cpp computes otherwise": (
        lambda shop: shop.copied(lambda path: toys.change_json(path / "config.json", norm_topk_prob=False)),
        "this qwen3_moe checkpoint has norm_topk_prob = False; llama.cpp's qwen3moe assumes True",
        "",
    ),
    "a checkpoint without its tokenizer": (
        lambda shop: shop.copied(lambda path: (path / "tokenizer.json").unlink()),
        "{path} holds no tokenizer.json",
        "save the tokenizer",
    ),
    "a missing tensor": (
        lambda shop: shop.copied(lambda path: without_tensor(path, "down_proj")),
        "{path} lacks tensor model.layers.0.mlp.experts.0.down_proj.weight",
        "",
    ),
    "weights that are NaN": (
        lambda shop: shop.copied(lambda path: with_nan(path, "down_proj")),
        "tensor model.layers.0.mlp.experts.0.down_proj.weight holds ",
        "damaged",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_bad_model_is_explained_and_nothing_is_left(case: str, workshop: Workshop) -> None:
    make, expected, way_out = MODELS[case]
    path = make(workshop)
    before = sorted(workshop.folder.rglob("*"))
    code = 2 if case == "a missing path" else 1
    said, hint = first_lines(run_edgeprune("fit", path, *DEVICE, "-o", workshop.folder / "run"), code)
    assert said.startswith("error: " + expected.format(path=path)), said
    assert way_out in hint
    assert sorted(workshop.folder.rglob("*")) == before


ALIKE = ["a dense GGUF", "a dense checkpoint", "an unknown model_type", "random bytes", "a missing path"]


@pytest.mark.parametrize("case", [*ALIKE, "a truncated safetensors"])
def test_inspect_explains_a_bad_model_in_the_same_words(case: str, workshop: Workshop) -> None:
    make, expected, way_out = MODELS[case]
    path = make(workshop)
    said, hint = first_lines(run_edgeprune("inspect", path, "--json"), 2 if case == "a missing path" else 1)
    assert said.startswith("error: " + expected.format(path=path)), said
    assert way_out in hint


@pytest.mark.parametrize(
    ("words", "expected", "way_out"),
    [
        ((), "say what to fit: exactly one of --device, --memory and --file-size", "--device auto"),
        (
            (*SIZE, "--reduce", "ream", "--width", "128"),
            "--reduce ream merges experts, and --width 128",
            "one of the",
        ),
        ((*SIZE, "--memory", "1GiB"), "say what to fit: exactly one of", "--device auto"),
        (("--device", "rpi6-8gb"), "no device profile 'rpi6-8gb'", "did you mean rpi5-8gb"),
        (("--device", "9.5GiB"), "no device profile '9.5GiB'", "a size of memory is given with --memory"),
        (("--devices", "4MB,6MB"), "no device profile '4MB'", "several with --file-sizes"),
        (("--device", "mine.toml"), "no profile file mine.toml", ""),
        (("--file-size", "5"), "'5' is not a size", "12MB"),
        ((*DEVICE, "--types", "Q4_X"), "unknown or unsuitable type Q4_X", "choose from IQ1_S"),
        ((*DEVICE, "--types", "Q4_K"), "no tensor of toy qwen3moe can be given the type Q4_K", "IQ4_NL"),
        ((*DEVICE, "--method", "best"), "unknown method 'best'", "known: replay"),
        ((*DEVICE, "--keep", "5"), "--keep 5 is not possible: the router uses 2 of 4 experts in 1 group(s)", ""),
        ((*DEVICE, "--keep", "1"), "--keep 1 is not possible: the router uses 2 of 4 experts in 1 group(s)", ""),
        (
            (*DEVICE, "--context", "4096"),
            "a context of 4096 tokens is longer than the model's 2048",
            "`--context 2048` is the longest",
        ),
        ((*DEVICE, "--text", "nowhere.txt"), "no text file nowhere.txt", ""),
    ],
    ids=[
        "no target",
        "merging and narrowing",
        "two targets",
        "unknown device",
        "a size for a device",
        "sizes for devices",
        "unknown profile file",
        "a size without a unit",
        "unknown type",
        "a type that fits no tensor",
        "unknown method",
        "more experts than there are",
        "fewer experts than the router uses",
        "a context beyond the model's",
        "a text that is not there",
    ],
)
def test_an_impossible_wish_exits_2_before_anything_is_measured(
    words: tuple[str, ...], expected: str, way_out: str, good_gguf: Path, tmp_path: Path
) -> None:
    said, hint = first_lines(run_edgeprune("fit", good_gguf, *words, "-o", tmp_path / "run"), 2)
    assert said.startswith("error: " + expected), said
    assert way_out in hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "expected", "rows", "way_out"),
    [
        (
            ("--file-size", "50kB"),
            "error: toy qwen3moe does not fit a file of 48.8 KiB",
            ["smallest plan", "its weights", "left for weights", "short of"],
            "B` is the least that works",
        ),
        (
            ("--memory", "20MiB"),
            "error: toy qwen3moe does not fit memory-20MiB: nothing is left for weights",
            [
                *("RAM", "runtime (process, libraries)", "KV cache", "compute buffers", "left for weights"),
                *("smallest plan", "its weights", "short of"),
            ],
            "MiB` is the least that works",
        ),
    ],
    ids=["file", "memory"],
)
def test_what_does_not_fit_exits_3_with_the_figures_before_anything_is_measured(
    words: tuple[str, ...], expected: str, rows: list[str], way_out: str, good_gguf: Path, tmp_path: Path
) -> None:
    done = run_edgeprune("fit", good_gguf, *words, "-o", tmp_path / "run")
    said, hint = first_lines(done, 3)
    assert said == expected
    assert way_out in hint
    lines = done.stderr.splitlines()[1:-1]
    assert len(lines) == len(rows)
    for row, line in zip(rows, lines, strict=True):
        assert row in line and (line.endswith("B") or row == "smallest plan")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--file-size", "--memory"])
def test_the_least_that_is_named_does_work(option: str, good_gguf: Path, small_text: Path, tmp_path: Path) -> None:
    words = ("plan", good_gguf, "--text", small_text, "-o", tmp_path / "run")
    _, hint = first_lines(run_edgeprune(*words, option, "20kB"), 3)
    given, least = hint.partition("`")[2].partition("`")[0].split()
    assert given == option
    done = run_edgeprune(*words, option, least)
    assert done.returncode == 0, done.stderr
    if option == "--file-size":  # to the byte, measured or not
        less = f"{int(least.removesuffix('B')) - 1}B"
        assert f"`--file-size {least}`" in first_lines(run_edgeprune(*words, option, less), 3)[1]


@pytest.mark.parametrize(
    ("content", "code", "expected"),
    [
        (b"\xff\xfe\x00garbage" * 100, 1, "error: cannot read {path} as UTF-8 text: "),
        (b"short", 1, "error: the text gives no calibration windows of 16 tokens or more"),
    ],
    ids=["no UTF-8", "too short"],
)
def test_a_bad_text_is_explained(content: bytes, code: int, expected: str, good_gguf: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    said, _ = first_lines(
        run_edgeprune("fit", good_gguf, "--file-size", "150kB", "--text", text, "-o", tmp_path / "run"), code
    )
    assert said.startswith(expected.format(path=text)), said


def test_an_output_that_is_a_file_is_explained(good_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    said, _ = first_lines(run_edgeprune("fit", good_gguf, *DEVICE, "-o", tmp_path / "file"), 1)
    assert said == f"error: {tmp_path / 'file'}: File exists"
    said, _ = first_lines(run_edgeprune("fit", good_gguf, *DEVICE, "-o", tmp_path / "file" / "run"), 1)
    assert said == f"error: {tmp_path / 'file' / 'run'}: Not a directory"
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def sealed(tmp_path: Path) -> Iterator[Path]:
    """A folder without the right to write."""
    folder = tmp_path / "sealed"
    folder.mkdir()
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    yield folder
    folder.chmod(0o755)


def test_an_output_without_the_right_to_write_is_explained(sealed: Path, good_gguf: Path) -> None:
    said, _ = first_lines(run_edgeprune("fit", good_gguf, *DEVICE, "-o", sealed / "run"), 1)
    assert said == f"error: {sealed / 'run'}: Permission denied"


def limited(nbytes: int) -> Callable[[], None]:
    """Makes every file that a process writes end at ``nbytes``, as a full disk would."""

    def limit() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))

    return limit


posix = pytest.mark.skipif(sys.platform == "win32", reason="resource limits")


@posix
def test_a_disk_that_fills_up_while_converting_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    words = ("fit", tiny_checkpoint, *DEVICE, "-o", tmp_path / "run")
    said, hint = first_lines(run_edgeprune(*words, preexec_fn=limited(1_000_000)), 1)
    assert said.endswith(f"writing {tmp_path / 'run' / 'source.gguf'} failed")
    assert "run the same command again" in hint
    assert list(tmp_path.iterdir()) == []


@posix
def test_a_disk_that_fills_up_while_measuring_keeps_what_was_measured(small_text: Path, tmp_path: Path) -> None:
    # The log-probabilities of the reference are larger than the model; everything before them is smaller.
    model = toys.synthetic_gguf(tmp_path / "model.gguf", layers=1, experts=2, width=64, expert_width=32)
    words = ("fit", model, "--file-size", "120kB", "--text", small_text, "--tokens", "64", "-o", tmp_path / "run")
    done = run_edgeprune(*words, preexec_fn=limited(model.stat().st_size + 4096))
    said, hint = first_lines(done, 1)
    assert said.startswith("error: ") and "scratch" in said and said.endswith(".logprobs failed")
    assert "goes on where it was" in hint
    left = [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert "statistics.safetensors" in left
    assert not [name for name in left if name.endswith(".partial")]


def test_text_that_calibrates_is_not_held_out(small_text: Path, good_gguf: Path, tmp_path: Path) -> None:
    words = (
        "fit",
        good_gguf,
        *DEVICE,
        "--text",
        small_text,
        "--eval-text",
        f"x={small_text}",
        "-o",
        tmp_path / "run",
    )
    said, hint = first_lines(run_edgeprune(*words), 2)
    assert "as --text and as --eval-text" in said and "a quarter" in hint


def test_a_disk_without_room_for_the_sums_is_explained(small_text: Path, tmp_path: Path) -> None:
    model = toys.synthetic_gguf(tmp_path / "model.gguf", layers=1, experts=2, width=64, expert_width=32)
    words = ("fit", model, "--file-size", "120kB", "--text", small_text, "-o", tmp_path / "run")
    said, hint = first_lines(run_edgeprune(*words, preexec_fn=limited(model.stat().st_size + 4096)), 1)
    assert "writing" in said and "statistics" in said
    assert "goes on where it was" in hint
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.endswith((".partial", ".safetensors"))]


def test_a_source_that_would_be_replaced_is_refused(tiny_fit: Fit, small_text: Path, tmp_path: Path) -> None:
    checkpoint = Path(tiny_fit.arguments[0])
    said, hint = first_lines(run_edgeprune("fit", checkpoint, *DEVICE, "-o", checkpoint), 2)
    assert said == f"error: {checkpoint} is the source itself" and "-o" in hint
    # The folder of a run belongs to its source, and an earlier result in it is another one.
    folder = tiny_fit.copy(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert ".edgeprune" in before
    source = next(folder.glob("*bpw.gguf"))
    words = ("build", source, "--file-size", "400kB", "--text", small_text, "-o", folder)
    said, hint = first_lines(run_edgeprune(*words), 2)
    assert said == f"error: {folder} is the run directory of {checkpoint}" and "-o" in hint
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_with_other_files_is_not_written_to(good_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    said, hint = first_lines(run_edgeprune("fit", good_gguf, *DEVICE, "-o", tmp_path), 2)
    assert said == f"error: {tmp_path} holds files that are not edgeprune's" and "-o" in hint
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"
