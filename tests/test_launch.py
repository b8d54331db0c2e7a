"""The line that a user copies runs the model as it was measured."""

from __future__ import annotations

import shlex
from itertools import pairwise

import pytest

from edgeprune.measure.launch import Launch


def test_the_line_says_everything_that_takes_memory() -> None:
    words = shlex.split(Launch(context=4096, kv_type="Q8_0", threads=6).command("model.gguf"))
    assert words[:3] == ["llama-server", "-m", "model.gguf"]
    options = dict(pairwise(words))
    wanted = {"-c": "4096", "-ctk": "q8_0", "-ctv": "q8_0", "-fa": "on", "-ngl": "0", "-t": "6", "-np": "1"}
    # The server's own caches of earlier prompts, which are no part of any promise.
    wanted |= {"--cache-ram": "0", "--ctx-checkpoints": "0"}
    assert wanted.items() <= options.items()
    assert "--no-repack" in words and "-sm" not in words


def test_a_model_on_a_gpu_stays_on_one() -> None:
    words = Launch(gpu_layers=-1, cpu_experts=3).command("m.gguf").split()
    assert words[words.index("-ngl") + 1] == "all"
    assert words[words.index("-sm") + 1] == "none"
    assert words[words.index("--n-cpu-moe") + 1] == "3"


@pytest.mark.parametrize("path", ["my models/a.gguf", "a;rm -rf b.gguf", "it's.gguf"])
def test_a_path_is_one_word_of_the_shell(path: str) -> None:
    assert shlex.split(Launch().command(path))[2] == path
