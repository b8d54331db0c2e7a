"""What the eval callback changes, against files that were really changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import toys

from edgeprune.build.builder import build
from edgeprune.decide.plan import Plan, Prediction
from edgeprune.errors import EdgepruneError
from edgeprune.measure.arena import Arena
from edgeprune.measure.collector import Collector
from edgeprune.measure.divergence import Reference, summarise
from edgeprune.measure.launch import Launch
from edgeprune.measure.llama import EvalCallback, Node, session
from edgeprune.measure.observers import Disturbance, RouterMask
from edgeprune.model.architecture import read_architecture
from edgeprune.model.gguf import GgufFile

pytest_plugins = ("demo_fixtures",)

Toy = Callable[[str], Path]
Doubles = npt.NDArray[np.float64]
TOKENS, WINDOWS = 48, 2
FAMILIES = ["qwen3_moe", "mixtral", "olmoe"]
LAUNCH = Launch(context=64, batch=64, threads=1, kv_type="F32")


def token_windows(vocabulary: int, count: int = WINDOWS, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(3, vocabulary - 16, TOKENS).tolist() for _ in range(count)]


def logits(model: Path, windows: list[list[int]], observer: EvalCallback | None = None) -> list[npt.NDArray[Any]]:
    with session(model, LAUNCH, observer) as opened:
        return [opened.run(tokens).copy() for tokens in windows]


# Masks against sliced files.


def sliced(model: Path, keep: dict[int, list[int]], output: Path, *, mtp: bool = False) -> Path:
    architecture = read_architecture(GgufFile(model), mtp=mtp)
    kept = {layer: tuple(ids) for layer, ids in keep.items()}
    plan = Plan(
        arch=architecture.arch,
        experts=architecture.experts,
        kept=len(next(iter(kept.values()))),
        keep=kept,
        types={},
        launch=Launch(),
        method="test",
        origin="user",
        predicted=Prediction(),
        made_from={},
        mtp=mtp,
    )
    build(str(model), plan.to_json(), str(output))
    return output


def divergences(
    source: Path, windows: list[list[int]], others: list[list[npt.NDArray[Any]]], folder: Path
) -> list[float]:
    """Mean KL divergence in nats of each of ``others`` from the ``source``."""
    original = logits(source, windows)
    kept = Reference(folder / "reference", original[0].shape[1])
    for rows in original:
        kept.append(rows)
    means = []
    for other in others:
        kept.rewind()
        scores = [kept.compare(rows, tuple(tokens)) for rows, tokens in zip(other, windows, strict=True)]
        means.append(summarise(scores).kl_mean)
    return means


GROUPED = {"experts": 16, "used": 3, "groups": 4, "groups_used": 2, "layers": 3}


@pytest.fixture(scope="module")
def routers(toy_gguf: Toy, synthetic: Toy, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A GGUF for each way to route: after the toys of transformers also ``grouped``, ``qwen2moe`` and ``gpt-oss``."""

    def make(name: str) -> Path:
        if name == "softmax of the chosen":
            path = tmp_path_factory.mktemp("chosen") / "chosen.gguf"
            gating = [("expert_gating_func", "u32", 3), ("expert_weights_norm", "bool", False)]
            return toys.synthetic_gguf(path, "deepseek2", layers=3, extra=gating)
        if name == "grouped":  # DeepSeek-V3: sigmoid, groups, a selection bias that the weights do not contain
            folder = tmp_path_factory.mktemp("grouped")
            return toys.synthetic_gguf(folder / "grouped.gguf", "deepseek2", **GROUPED)
        return toy_gguf(name) if name in FAMILIES else synthetic(name)

    return make


@pytest.mark.parametrize(
    ("router", "keep"),
    [
        ("qwen3_moe", {0: [0, 2, 3, 7], 1: [1, 2, 4, 6]}),
        ("mixtral", {0: [1, 3], 1: [0, 7]}),
        ("olmoe", {0: [0, 1, 4, 5, 6], 1: [2, 3, 4, 6, 7]}),
        ("qwen2moe", {0: [0, 2, 3, 7], 1: [1, 2, 4, 6]}),
        ("gpt-oss", {0: [0, 2, 3, 7], 1: [1, 2, 4, 6]}),
        ("grouped", {1: [0, 2, 5, 6, 8, 11, 14, 15], 2: [1, 3, 4, 7, 9, 10, 12, 13]}),
        ("softmax of the chosen", {1: [0, 2, 5, 6], 2: [1, 3, 4, 7]}),
        ("llama4", {0: [0, 2, 5, 6], 1: [1, 3, 4, 7], 2: [0, 1, 2, 3], 3: [4, 5, 6, 7]}),
    ],
    ids=[
        "softmax renormalised",
        "softmax over the chosen",
        "softmax not renormalised",
        "not renormalised beside a shared expert",
        "router and expert biases",
        "sigmoid with groups and selection bias",
        "softmax over the chosen, whose logits are called probabilities",
        "coefficients inside the experts",
    ],
)
def test_masking_the_router_equals_dropping_the_experts_from_the_file(
    router: str, keep: dict[int, list[int]], routers: Toy, tmp_path: Path
) -> None:
    source = routers(router)
    architecture = read_architecture(GgufFile(source))
    windows = token_windows(architecture.vocabulary)
    masked = logits(source, windows, RouterMask(keep, architecture.experts))
    dropped = logits(sliced(source, keep, tmp_path / "sliced.gguf"), windows)
    by_mask, by_file = divergences(source, windows, [masked, dropped], tmp_path)
    assert by_file > 1e-3  # dropping these experts is felt
    assert by_mask == pytest.approx(by_file, rel=1e-3)
    for masked_rows, dropped_rows in zip(masked, dropped, strict=True):
        np.testing.assert_allclose(masked_rows, dropped_rows, atol=2e-3)


def test_a_mask_of_one_layer_leaves_the_others_whole(toy_gguf: Toy, tmp_path: Path) -> None:
    model, windows = toy_gguf("qwen3_moe"), token_windows(toys.VOCABULARY, 1)
    mask = RouterMask({1: [0, 1, 2]}, toys.EXPERTS)
    names = frozenset(name for name in GgufFile(model).tensors if "exps" in name)
    collector = Collector(toys.EXPERTS, Arena(tmp_path), weights=names)

    def both(node: Node, ask: bool) -> bool:
        wanted = mask(node, ask)
        return collector(node, ask) or wanted

    logits(model, windows, both)
    layers = collector.layers()
    assert (layers[0]["routed"] > 0).sum() > 3
    assert np.flatnonzero(layers[1]["routed"][0]).tolist() == [0, 1, 2]


def test_a_mask_that_keeps_all_changes_nothing(toy_gguf: Toy) -> None:
    model, windows = toy_gguf("mixtral"), token_windows(toys.VOCABULARY, 1)
    everything = RouterMask({layer: list(range(toys.EXPERTS)) for layer in range(toys.LAYERS)}, toys.EXPERTS)
    np.testing.assert_array_equal(logits(model, windows, everything)[0], logits(model, windows)[0])


# Noise of known size.


@pytest.mark.parametrize(
    ("weight", "lookup"),
    [("blk.0.ffn_down_exps.weight", False), ("blk.1.attn_q.weight", False), ("token_embd.weight", True)],
    ids=["experts", "attention", "embedding rows"],
)
@pytest.mark.parametrize("size", [0.01, 0.1])
def test_disturbance_has_the_size_that_was_asked_for(weight: str, lookup: bool, size: float, toy_gguf: Toy) -> None:
    disturbance = Disturbance(weight, lookup=lookup, relative_square=size, seed=3)
    measured = []

    def watch(node: Node, ask: bool) -> bool:
        if ask:
            return disturbance(node, ask)
        before = np.array(node.read(), np.float64)
        disturbance(node, ask)
        error = np.square(np.array(node.read(), np.float64) - before).sum()
        measured.append(error / np.square(before).sum())
        return True

    changed = logits(toy_gguf("qwen3_moe"), token_windows(toys.VOCABULARY, 1), watch)
    assert disturbance.touched == len(measured) == 1
    assert measured[0] == pytest.approx(size, rel=0.05)
    assert not np.array_equal(changed[0], logits(toy_gguf("qwen3_moe"), token_windows(toys.VOCABULARY, 1))[0])


def test_an_error_in_an_observer_is_raised_and_not_swallowed(toy_gguf: Toy) -> None:
    def clumsy(node: Node, ask: bool) -> bool:
        if not ask and node.op == "MUL_MAT_ID":
            raise ZeroDivisionError("in the observer")
        return node.op == "MUL_MAT_ID"

    with pytest.raises(ZeroDivisionError, match="in the observer"):
        logits(toy_gguf("qwen3_moe"), token_windows(toys.VOCABULARY, 1), clumsy)


def test_a_layer_that_cannot_be_masked_is_an_error(toy_gguf: Toy) -> None:
    model, windows = toy_gguf("qwen3_moe"), token_windows(toys.VOCABULARY, 1)
    mask = RouterMask({0: [0, 1, 2], 7: [0, 1]}, toys.EXPERTS)
    logits(model, windows, mask)
    with pytest.raises(EdgepruneError, match="no router scores in layer 7"):
        mask.check()
    RouterMask({9: list(range(toys.EXPERTS))}, toys.EXPERTS).check()  # keeps all: nothing to mask
