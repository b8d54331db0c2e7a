"""What the eval callback sees, against transformers; what it changes, against files that were really changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import toys

from edgeprune.build.builder import build
from edgeprune.decide.plan import Plan, Prediction
from edgeprune.measure import llama
from edgeprune.measure.divergence import Reference, summarise
from edgeprune.measure.launch import Launch
from edgeprune.measure.llama import EvalCallback, Node, session
from edgeprune.measure.observers import Collector, Disturbance, RouterMask
from edgeprune.measure.statistics import PER_EXPERT, Statistics
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


# Statistics of one pass, one domain a window.


def collected(model: Path, windows: list[list[int]]) -> Collector:
    architecture = read_architecture(GgufFile(model))
    names = {tensor.name for tensor in architecture.tensors if tensor.quantisable}
    collector = Collector(names, architecture.experts, len(windows), gates_input=False)
    with pytest.MonkeyPatch.context() as patch:
        # Flash attention rounds keys and values to F16, which transformers does not.
        patch.setattr(llama, "FLASH_ATTENTION_ON", 0)
        opened = llama.Session(model, LAUNCH, collector)
    with contextlib.closing(opened):
        for domain, tokens in enumerate(windows):
            collector.domain = domain
            opened.run(tokens)
    return collector


class Expected:
    """The same sums from transformers: inputs by hooks, routing and experts written out here."""

    def __init__(self, checkpoint: Path, windows: list[list[int]], *, renormalised: bool) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        )
        self.renormalised = renormalised
        self.inputs: dict[str, list[Any]] = {}
        self.outputs: dict[str, list[Any]] = {}
        for name, module in self.model.named_modules():
            if name.endswith((".mlp", "_proj", "lm_head")):
                module.register_forward_hook(self._keeper(name))
        with torch.no_grad():
            for tokens in windows:
                self.model(torch.tensor([tokens]))

    def _keeper(self, name: str) -> Callable[..., None]:
        def keep(_: Any, arguments: Any, output: Any) -> None:
            self.inputs.setdefault(name, []).append(arguments[0][0].double())
            first = output[0] if isinstance(output, tuple) else output
            self.outputs.setdefault(name, []).append(first[0].double())

        return keep

    @cache  # noqa: B019 - one instance a family
    def experts(self, layer: int) -> dict[str, Doubles]:
        """The accumulators of a layer by name, and per expert the squares of inputs and outputs."""
        import torch

        block = self.model.model.layers[layer].mlp
        gate_up, down = block.experts.gate_up_proj.detach().double(), block.experts.down_proj.detach().double()
        count, width = gate_up.shape[0], down.shape[2]
        sums = {name: np.zeros((WINDOWS, count)) for name in PER_EXPERT}
        squares = {
            "gate_in": np.zeros((count, gate_up.shape[2])),
            "down_in": np.zeros((count, width)),
            "gate_out": np.zeros(count),
            "up_out": np.zeros(count),
            "down_out": np.zeros(count),
        }
        for domain, rows in enumerate(self.inputs[f"model.layers.{layer}.mlp"]):
            probabilities = torch.softmax(rows @ block.gate.weight.detach().double().T, dim=-1)
            weights, chosen = probabilities.topk(toys.USED, dim=-1)
            if self.renormalised:
                weights = weights / weights.sum(dim=-1, keepdim=True)
            for token, slot in np.ndindex(tuple(chosen.shape)):
                expert, g, x = int(chosen[token, slot]), float(weights[token, slot]), rows[token]
                gate, up = (gate_up[expert] @ x).split(width)
                hidden = torch.nn.functional.silu(gate) * up
                output = down[expert] @ hidden
                norm = float(output.norm())
                values = (1, g, g**2, norm, g * norm, (g * norm) ** 2)
                for name, value in zip(PER_EXPERT, values, strict=True):
                    sums[name][domain, expert] += value
                squares["gate_in"][expert] += x.numpy() ** 2
                squares["down_in"][expert] += hidden.numpy() ** 2
                squares["gate_out"][expert] += float(gate.square().sum())
                squares["up_out"][expert] += float(up.square().sum())
                squares["down_out"][expert] += norm**2
        return {**sums, **squares}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, toy_gguf: Toy, toy_checkpoint: Toy) -> tuple[Collector, Expected]:
    windows = token_windows(toys.VOCABULARY)
    expected = Expected(toy_checkpoint(request.param), windows, renormalised=request.param != "olmoe")
    return collected(toy_gguf(request.param), windows), expected


def test_every_layer_sees_every_token(family: tuple[Collector, Expected]) -> None:
    collector, _ = family
    assert sorted(collector.layers) == list(range(toys.LAYERS))
    for sums in collector.layers.values():
        assert sums.routed.sum(axis=1).tolist() == [TOKENS * toys.USED] * WINDOWS


def test_routing_and_expert_norms_equal_those_of_transformers(family: tuple[Collector, Expected]) -> None:
    collector, expected = family
    for layer, sums in collector.layers.items():
        wanted = expected.experts(layer)
        np.testing.assert_array_equal(sums.routed, wanted["routed"])
        for name in PER_EXPERT[1:]:
            np.testing.assert_allclose(getattr(sums, name), wanted[name], rtol=1e-4, err_msg=f"layer {layer} {name}")


def test_input_moments_of_experts_equal_those_of_transformers(family: tuple[Collector, Expected]) -> None:
    collector, expected = family
    for layer in range(toys.LAYERS):
        wanted = expected.experts(layer)
        routed = wanted["routed"].sum(axis=0)
        for kind, source in (("gate", "gate_in"), ("up", "gate_in"), ("down", "down_in")):
            moment = collector.moments[f"blk.{layer}.ffn_{kind}_exps.weight"]
            np.testing.assert_array_equal(moment.count, routed)
            np.testing.assert_allclose(moment.square_sum, wanted[source], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(moment.output_square, wanted[f"{kind}_out"], rtol=1e-4)


def test_input_moments_of_dense_weights_equal_those_of_transformers(family: tuple[Collector, Expected]) -> None:
    collector, expected = family
    places = {f"blk.{layer}.attn_{gguf}.weight": f"model.layers.{layer}.self_attn.{own}_proj"
              for layer in range(toys.LAYERS)
              for gguf, own in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o"))}  # fmt: skip
    for name, place in {**places, "output.weight": "lm_head"}.items():
        moment = collector.moments[name]
        wanted = sum(rows.square().sum(dim=0).numpy() for rows in expected.inputs[place])
        energy = sum(float(rows.square().sum()) for rows in expected.outputs[place])
        assert moment.count.tolist() == [TOKENS * WINDOWS]
        np.testing.assert_allclose(moment.square_sum[0], wanted, rtol=1e-4, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(moment.output_square, [energy], rtol=1e-4, err_msg=name)


def test_statistics_survive_the_disk(family: tuple[Collector, Expected], tmp_path: Path) -> None:
    collector, _ = family
    saved = Statistics(["a", "b"], 96, 48, collector.layers, collector.moments, {"model": "x"})
    saved.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    assert (loaded.domains, loaded.tokens, loaded.window, loaded.made_from) == (["a", "b"], 96, 48, {"model": "x"})
    for layer, sums in collector.layers.items():
        for name in PER_EXPERT:
            np.testing.assert_array_equal(getattr(loaded.layers[layer], name), getattr(sums, name))
    for name, moment in collector.moments.items():
        np.testing.assert_array_equal(loaded.moments[name].square_sum, moment.square_sum)
        np.testing.assert_array_equal(loaded.moments[name].mean(), moment.mean())


def test_observing_changes_no_logit(toy_gguf: Toy) -> None:
    model, windows = toy_gguf("olmoe"), token_windows(toys.VOCABULARY, 1)
    names = set(GgufFile(model).tensors)
    watched = logits(model, windows, Collector(names, toys.EXPERTS, 1, gates_input=False))
    np.testing.assert_array_equal(watched[0], logits(model, windows)[0])


# Masks against sliced files.


def sliced(model: Path, keep: dict[int, list[int]], output: Path) -> Path:
    architecture = read_architecture(GgufFile(model))
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
    ],
    ids=[
        "softmax renormalised",
        "softmax over the chosen",
        "softmax not renormalised",
        "not renormalised beside a shared expert",
        "router and expert biases",
        "sigmoid with groups and selection bias",
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


def test_a_mask_of_one_layer_leaves_the_others_whole(toy_gguf: Toy) -> None:
    model, windows = toy_gguf("qwen3_moe"), token_windows(toys.VOCABULARY, 1)
    mask = RouterMask({1: [0, 1, 2]}, toys.EXPERTS)
    names = {name for name in GgufFile(model).tensors if "exps" in name}
    collector = Collector(names, toys.EXPERTS, 1, gates_input=False)

    def both(node: Node, ask: bool) -> bool:
        wanted = mask(node, ask)
        return collector(node, ask) or wanted

    logits(model, windows, both)
    assert (collector.layers[0].routed > 0).sum() > 3
    assert np.flatnonzero(collector.layers[1].routed[0]).tolist() == [0, 1, 2]


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
