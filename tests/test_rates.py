"""Speed of this machine's products, and the speed of plans that is computed from it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest
import toys

from edgeprune.decide.latency import Speed, speed
from edgeprune.errors import BadFile
from edgeprune.measure import child
from edgeprune.measure.launch import generated_tokens, prompt_tokens
from edgeprune.measure.rates import TYPES, KernelRates, kernel_rates
from edgeprune.model.architecture import Architecture, read_architecture
from edgeprune.model.gguf import GgufFile

pytest_plugins = ("demo_fixtures",)

# Of a weight in nanoseconds, round numbers.
ROUND = KernelRates(
    dense={"F32": 1e-9, "F16": 2e-9, "Q8_0": 4e-9},
    dense_batch={"F32": 0.5e-9, "F16": 1e-9, "Q8_0": 2e-9},
    experts={"F32": 3e-9, "Q8_0": 8e-9},
    experts_batch={"F32": 1.5e-9, "Q8_0": 5e-9},
    streams=[(1 << 10, 0.0), (1 << 30, 0.0)],
    rows=(0.0, 0.0),
    besides=(1e-4, 1e-5, 1e-8),
    besides_batch=(0.0, 1e-6, 1e-8),
    cache=6e-9,
)


@pytest.fixture(scope="module")
def architecture(synthetic: toys.Maker) -> Architecture:
    return read_architecture(GgufFile(synthetic("qwen3moe")))


def timed(architecture: Architecture, kept: int = 8, types: dict[str, str] | None = None, **changes: Any) -> Speed:
    """With ``ROUND`` rates, and one thread unless said otherwise."""
    threads, bandwidth = changes.pop("threads", 1), changes.pop("bandwidth", 1e12)
    rates = replace(ROUND, **changes)
    found = speed(architecture, kept, types or {}, rates, prompt_tokens=100, threads=threads, bandwidth=bandwidth)
    assert found is not None
    return found


def test_a_token_meets_every_matrix_once_and_the_experts_in_use(architecture: Architecture) -> None:
    """By hand, from the toy's numbers; its output matrix is no embedding, which costs nothing."""
    width, hidden, layers, vocabulary = toys.WIDTH, toys.EXPERT_WIDTH, toys.LAYERS, 320
    attention = sum(
        tensor.shape[0] * tensor.shape[1]
        for tensor in architecture.tensors
        if tensor.role == "attention" and len(tensor.shape) == 2
    )
    (inner,) = {t.shape[0] for t in architecture.tensors if t.name.endswith("attn_output.weight")}
    dense = attention + layers * width * toys.EXPERTS
    experts = layers * 3 * toys.USED * width * hidden
    output = width * vocabulary
    found = timed(architecture)
    besides = 1e-4 + layers * (1e-5 + 1e-8 * width)
    decode = (dense + output) * 1e-9 + experts * 3e-9 + 2 * 100 * inner * layers * 6e-9 + besides
    assert 1 / found.decode_per_s == pytest.approx(decode)
    prefill = (dense + output / 100) * 0.5e-9 + experts * 1.5e-9 + 2 * 50 * inner * layers * 1e-9
    prefill += layers * (1e-6 + 1e-8 * width)
    assert 1 / found.prefill_per_s == pytest.approx(prefill)


def test_experts_that_are_dropped_cost_no_time_either_way(architecture: Architecture) -> None:
    """As many are used per token; only the router is smaller."""
    whole, half = timed(architecture), timed(architecture, kept=4)
    router = toys.LAYERS * toys.WIDTH * 4 * 1e-9
    assert 1 / whole.decode_per_s - 1 / half.decode_per_s == pytest.approx(router)


def test_another_type_has_its_own_rate_and_one_that_was_not_measured_none(architecture: Architecture) -> None:
    name = "blk.0.ffn_up_exps.weight"
    before, after = timed(architecture), timed(architecture, types={name: "Q8_0"})
    weights = toys.USED * toys.WIDTH * toys.EXPERT_WIDTH
    assert 1 / after.decode_per_s - 1 / before.decode_per_s == pytest.approx(weights * (8e-9 - 3e-9))
    assert 1 / after.prefill_per_s - 1 / before.prefill_per_s == pytest.approx(weights * (5e-9 - 1.5e-9))
    assert speed(architecture, 8, {name: "Q6_K"}, ROUND, prompt_tokens=9, threads=1, bandwidth=1e9) is None


def test_what_no_cache_holds_waits_for_the_memory_whatever_the_threads(architecture: Architecture) -> None:
    slow = {"streams": [(1 << 10, 0.0), (1 << 11, 1e-6)]}
    alone, shared = timed(architecture, **slow), timed(architecture, threads=4, **slow)
    assert shared.decode_per_s > 3.5 * alone.decode_per_s
    limited = timed(architecture, threads=4, bandwidth=1e6, **slow)
    assert limited.decode_per_s < alone.decode_per_s * 1.1
    # In a cache that is larger than the model, the memory does not matter.
    cached = {"streams": [(1 << 10, 0.0), (1 << 40, 0.0)]}
    assert timed(architecture, bandwidth=1e3, **cached) == timed(architecture, bandwidth=1e12, **cached)


def test_fetching_weights_comes_on_top_of_multiplying_with_them(architecture: Architecture) -> None:
    """Of the weights that a token meets, in bytes; the toy's are all in F32."""
    near, far = timed(architecture), timed(architecture, streams=[(1 << 10, 1e-12), (1 << 11, 5e-12)])
    weights = sum(
        float(np.prod(tensor.shape)) * (toys.USED / toys.EXPERTS if tensor.is_expert else 1)
        for tensor in architecture.tensors
        if len(tensor.shape) > 1 and tensor.role != "embedding"
    )
    assert 1 / far.decode_per_s - 1 / near.decode_per_s == pytest.approx(4 * weights * 4e-12)
    assert far.prefill_per_s == near.prefill_per_s


def test_a_dense_matrix_comes_back_sooner_than_an_expert(architecture: Architecture) -> None:
    """With a cache that holds what one token meets, but not all experts. The table of rows is never read through."""
    met = [tensor for tensor in architecture.tensors if len(tensor.shape) > 1 and tensor.role != "embedding"]
    everything = sum(tensor.nbytes for tensor in met)
    experts = sum(tensor.nbytes for tensor in met if tensor.is_expert) * toys.USED / toys.EXPERTS
    one_token = everything - sum(tensor.nbytes for tensor in met if tensor.is_expert) + experts
    knee = timed(architecture, streams=[(int(one_token), 0.0), (everything, 8e-12)])
    assert 1 / knee.decode_per_s - 1 / timed(architecture).decode_per_s == pytest.approx(experts * 8e-12)


def test_every_row_takes_its_time_whatever_its_length(architecture: Architecture) -> None:
    """Of attention, router, used experts, and of the output for a prompt's last token."""
    none, some = timed(architecture), timed(architecture, rows=(1e-8, 1e-9))
    dense = sum(
        t.shape[1] for t in architecture.tensors if len(t.shape) == 2 and t.role not in ("embedding", "output")
    )
    experts = sum(t.shape[1] * toys.USED for t in architecture.tensors if t.is_expert)
    assert 1 / some.decode_per_s - 1 / none.decode_per_s == pytest.approx((dense + experts + 320) * 1e-8)
    assert 1 / some.prefill_per_s - 1 / none.prefill_per_s == pytest.approx((dense + experts + 3.2) * 1e-9)


def test_threads_share_products_but_not_the_rest(architecture: Architecture) -> None:
    besides = 1e-4 + toys.LAYERS * (1e-5 + 1e-8 * toys.WIDTH)
    one, two = timed(architecture), timed(architecture, threads=2)
    assert 1 / two.decode_per_s - besides == pytest.approx((1 / one.decode_per_s - besides) / 2)


@pytest.mark.parametrize(
    ("context", "prompt", "generated"), [(8192, 512, 48), (256, 223, 32), (16, 13, 2), (1, 1, 1)]
)
def test_speed_is_measured_and_predicted_after_the_same_prompt(context: int, prompt: int, generated: int) -> None:
    assert (prompt_tokens(context), generated_tokens(context)) == (prompt, generated)


@pytest.fixture(scope="module")
def measured(own_home: Path) -> KernelRates:
    return kernel_rates()


def test_this_machine_is_measured_sensibly(measured: KernelRates) -> None:
    for table in (measured.dense, measured.dense_batch, measured.experts, measured.experts_batch):
        assert set(table) == set(TYPES)
        assert all(1e-13 < seconds < 1e-7 for seconds in table.values()), table
    # The tables of grids are slower to multiply with than whole numbers, everywhere.
    assert measured.dense["IQ3_S"] > measured.dense["Q8_0"]
    assert measured.stream(1 << 20) < measured.stream(1 << 30) < 1e-7
    assert 1e-11 < measured.cache < 1e-7
    assert all(0 <= seconds < 1e-6 for seconds in measured.rows)  # which is larger is a matter of who else computes
    assert all(1e-7 < sum(seconds) < 1e-2 for seconds in (measured.besides, measured.besides_batch))


def test_rates_are_measured_once(measured: KernelRates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(child, "call")
    assert kernel_rates() == measured
    assert KernelRates.from_json(json.loads(json.dumps(measured.to_json())), "here") == measured


def test_rates_that_others_disturbed_count_for_an_hour(
    measured: KernelRates, monkeypatch: pytest.MonkeyPatch
) -> None:
    (note,) = (Path(platformdirs.user_cache_dir("edgeprune")) / "kernels").glob("*.json")
    kept, times = note.read_text(), note.stat()
    monkeypatch.delattr(child, "call")
    try:
        for share, age, counts in ((0.0, 10**6, True), (None, 10**6, True), (0.5, 60, True), (0.5, 4000, False)):
            note.write_text(json.dumps({**json.loads(kept), "others": share}))
            os.utime(note, (times.st_atime, time.time() - age))
            if counts:
                assert kernel_rates() == measured
            else:
                with pytest.raises(AttributeError):  # it is measured again
                    kernel_rates()
    finally:
        note.write_text(kept)


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.update(format=0),
        lambda value: value.pop("dense"),
        lambda value: value["dense"].update(Q9_9=1.0),
        lambda value: value["experts"].update(Q8_0="quick"),
        lambda value: value.update(besides=[1.0, 2.0]),
        lambda value: value.update(streams=[[1]]),
    ],
    ids=["form", "missing", "unknown type", "text", "too few", "pairs"],
)
def test_remembered_rates_that_are_damaged_are_refused(
    change: Callable[[dict[str, Any]], Any], measured: KernelRates
) -> None:
    value = json.loads(json.dumps(measured.to_json()))
    change(value)
    with pytest.raises(BadFile):
        KernelRates.from_json(value, "here")


def test_a_prediction_is_near_the_measurement_of_one_thread(measured: KernelRates, demo_gguf: Path) -> None:
    """Within a factor of two and a half: a busy machine takes the caches away from whoever is measured."""
    architecture = read_architecture(GgufFile(demo_gguf))
    predicted = speed(architecture, architecture.experts, {}, measured, prompt_tokens=128, threads=1, bandwidth=1e10)
    launch = {"context": 256, "threads": 1}
    arguments = {"model": str(demo_gguf), "launch": launch, "prompt_tokens": 128, "generated_tokens": 16}
    found = child.call("edgeprune.measure.benchmark:benchmark", {**arguments, "repeats": 5, "processor_time": True})
    assert predicted is not None
    assert 0.4 < predicted.decode_per_s / found["decode_per_s"] < 2.5
    assert 0.4 < predicted.prefill_per_s / found["prefill_per_s"] < 2.5
