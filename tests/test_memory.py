"""Memory: what llama.cpp is predicted to need is what it then takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgeprune.errors import UsageError
from edgeprune.measure import child, memory
from edgeprune.measure.launch import Launch
from edgeprune.model.architecture import read_architecture
from edgeprune.model.gguf import GgufFile
from edgeprune.model.layout import layout

pytest_plugins = ("demo_fixtures",)


@pytest.mark.parametrize(
    ("context", "kv_type"), [(512, "F16"), (1024, "F16"), (1024, "Q8_0")], ids=["short", "long", "quantised cache"]
)
def test_predicted_peak_is_what_a_full_context_takes(demo_gguf: Path, context: int, kv_type: str) -> None:
    file = GgufFile(demo_gguf)
    architecture = read_architecture(file)
    launch = Launch(context=context, kv_type=kv_type)
    whole = layout(file, architecture, architecture.experts, {}, [])
    needs = memory.price(whole, launch, architecture)
    arguments = {"prompt_tokens": 256, "generated_tokens": 8, "repeats": 1}
    measured = child.call(
        "edgeprune.measure.benchmark:benchmark", {"model": str(demo_gguf), "launch": launch.to_json(), **arguments}
    )
    assert measured["filled_tokens"] == context
    predicted = needs.kv_bytes + needs.compute_bytes + needs.runtime_bytes + architecture.nbytes
    assert 0.99 <= predicted / measured["peak_bytes"] <= 1.05


def test_cache_is_priced_by_context_and_type(demo_gguf: Path) -> None:
    file = GgufFile(demo_gguf)
    architecture = read_architecture(file)
    whole = layout(file, architecture, architecture.experts, {}, [])
    priced = {
        (context, kind): memory.price(whole, Launch(context=context, kv_type=kind), architecture).kv_bytes
        for context, kind in [(512, "F16"), (1024, "F16"), (1024, "Q8_0")]
    }
    # 4 layers, keys and values, 2 heads of 64: 2 bytes a number, or 34 bytes a block of 32.
    assert priced[512, "F16"] == 4 * 2 * 512 * 128 * 2
    assert priced[1024, "F16"] == 2 * priced[512, "F16"]
    assert priced[1024, "Q8_0"] == pytest.approx(priced[1024, "F16"] * 34 / 64, rel=0.01)


def test_a_context_beyond_the_models_is_refused(demo_gguf: Path) -> None:
    file = GgufFile(demo_gguf)
    architecture = read_architecture(file)
    whole = layout(file, architecture, architecture.experts, {}, [])
    with pytest.raises(UsageError, match="longer than the model's 2048"):
        memory.price(whole, Launch(context=4096), architecture)


@pytest.mark.parametrize("arch", ["deepseek2", "gpt-oss"], ids=["latent attention", "sliding window"])
def test_cache_of_unusual_attention_is_llamacpps_own_figure(synthetic: Callable[[str], Path], arch: str) -> None:
    path = synthetic(arch)
    file = GgufFile(path)
    architecture = read_architecture(file)
    whole = layout(file, architecture, architecture.experts, {}, [])
    short, long = (memory.price(whole, Launch(context=n), architecture).kv_bytes for n in (512, 2048))
    assert 0 < short <= long
    buffers = child.call(
        "edgeprune.measure.benchmark:benchmark",
        {"model": str(path), "launch": Launch(context=512).to_json(), "prompt_tokens": 8, "generated_tokens": 1},
    )
    assert buffers["finite"]
