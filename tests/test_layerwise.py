"""The torch engine against llama.cpp, and its gradients against automatic differentiation of the whole model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import families
import numpy as np
import numpy.typing as npt
import pytest
import torch
import toys
from observed import FAMILIES, KEPT, TOKENS, WINDOWS, Toy, collected, statistics, token_windows

from edgeprune.decide.evidence import Evidence
from edgeprune.decide.scores import SCORES
from edgeprune.errors import BadFile, Unsupported
from edgeprune.measure.layerwise import engine
from edgeprune.measure.layerwise.carried import Carried
from edgeprune.measure.layerwise.engine import Text, measure
from edgeprune.measure.layerwise.experts import Observer
from edgeprune.measure.layerwise.parameters import Parameters
from edgeprune.measure.layerwise.skeleton import Skeleton
from edgeprune.measure.merging import merge
from edgeprune.measure.statistics import BACKWARD, FORWARD, Statistics
from edgeprune.measure.text import Window
from edgeprune.model.architecture import read_architecture
from edgeprune.model.checkpoint import open_checkpoint
from edgeprune.model.convert import convert
from edgeprune.model.converter import converter_for
from edgeprune.model.gguf import GgufFile

Doubles = npt.NDArray[np.float64]


def text() -> Text:
    """Two windows as two domains, a few tokens of each kept."""
    windows = token_windows(toys.VOCABULARY)
    parts = [Window("ab"[number], tuple(tokens)) for number, tokens in enumerate(windows)]
    return Text(parts, [KEPT] * WINDOWS)


def weights_of(model: Path) -> list[str]:
    return [tensor.name for tensor in read_architecture(GgufFile(model)).tensors if tensor.quantisable]


def measured(checkpoint: Path, model: Path, folder: Path) -> Statistics:
    output = folder / "torch.safetensors"
    measure(checkpoint, text(), output, folder, weights_of(model), toys.EXPERTS, TOKENS, {"model": "toy"})
    return Statistics.load(output)


class Both:
    """One toy model, measured by either engine over the same windows."""

    def __init__(self, name: str, model: Path, checkpoint: Path, folder: Path) -> None:
        self.name, self.checkpoint = name, checkpoint
        self.torch = measured(checkpoint, model, folder)
        parts = []
        for number, tokens in enumerate(token_windows(toys.VOCABULARY)):
            parts.append(folder / f"{number}.safetensors")
            own = statistics(collected(model, [tokens], folder), "ab"[number], {"model": "toy"})
            own.save(parts[-1])
        merge(parts, folder / "llama.safetensors", {"model": "toy"})
        self.llama = Statistics.load(folder / "llama.safetensors")


@pytest.fixture(scope="module", params=FAMILIES)
def both(
    request: pytest.FixtureRequest, toy_gguf: Toy, toy_checkpoint: Toy, tmp_path_factory: pytest.TempPathFactory
) -> Both:
    name = request.param
    return Both(name, toy_gguf(name), toy_checkpoint(name), tmp_path_factory.mktemp(name))


def test_forward_statistics_of_both_engines_agree(both: Both) -> None:
    assert both.torch.domains == both.llama.domains
    assert sorted(both.torch.layers) == sorted(both.llama.layers)
    for layer, sums in both.llama.layers.items():
        for name in FORWARD:
            got, want = both.torch.layers[layer][name], sums[name]
            assert got.shape == want.shape, name
            scale = np.abs(want).max() or 1.0
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5 * scale, err_msg=f"layer {layer}, {name}")


def test_input_moments_of_both_engines_agree(both: Both) -> None:
    assert set(both.torch.moments) == set(both.llama.moments)
    for name, moment in both.llama.moments.items():
        own = both.torch.moments[name]
        np.testing.assert_array_equal(own.count, moment.count)
        np.testing.assert_allclose(own.square_sum, moment.square_sum, rtol=1e-3, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(own.output_square, moment.output_square, rtol=1e-3, err_msg=name)


# Whose modules are several weights of a GGUF, or have their inputs in another order there.
REORDERED = ("granitemoehybrid", "qwen3_next", "qwen3_5_moe", "nemotron_h")


@pytest.mark.parametrize("name", REORDERED)
def test_moments_follow_the_weights_to_where_conversion_moves_them(name: str, tmp_path: Path) -> None:
    checkpoint = families.make_checkpoint(name, tmp_path / "model")
    convert(checkpoint, tmp_path / "model.gguf", "f32")
    own = measured(checkpoint, tmp_path / "model.gguf", tmp_path).moments
    windows = token_windows(toys.VOCABULARY)
    native = statistics(collected(tmp_path / "model.gguf", windows, tmp_path), "a", {"model": "toy"}).moments
    assert set(own) == set(native)
    for weight, moment in native.items():
        np.testing.assert_allclose(own[weight].square_sum, moment.square_sum, rtol=2e-3, atol=1e-5, err_msg=weight)
        np.testing.assert_allclose(own[weight].output_square, moment.output_square, rtol=2e-3, err_msg=weight)


def test_reservoirs_of_both_engines_agree(both: Both) -> None:
    assert set(both.torch.reservoirs) == set(both.llama.reservoirs)
    for layer, tokens in both.llama.reservoirs.items():
        own = both.torch.reservoirs[layer]
        np.testing.assert_array_equal(own.domain, tokens.domain)
        np.testing.assert_array_equal(own.ids, tokens.ids)
        for name in ("x", "y", "gates", "selection", "residual", "turn"):
            got, want = getattr(own, name), getattr(tokens, name)
            np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-3 * np.abs(want).max(), err_msg=name)


# The gradients.


class Differentiated:
    """The whole model in memory, its experts written out, the loss differentiated by factors on everything."""

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        self.model.requires_grad_(False)
        self.leaves: list[dict[str, torch.Tensor]] = []
        for layer in self.model.model.layers:
            layer.mlp.experts.forward = MethodType(self._experts, layer.mlp.experts)

    def _experts(self, module: Any, x: torch.Tensor, ids: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Every expert on every token, with a factor 1 on each neuron and on each contribution, and a term 0 added to
        each hidden value and to the output."""
        tokens, used = ids.shape
        gate, up = torch.einsum("td,tkfd->tkf", x, module.gate_up_proj[ids]).chunk(2, dim=-1)
        a = module.act_fn(gate) * up
        leaves = {
            "neuron": torch.ones_like(a, requires_grad=True),
            "hidden": torch.zeros_like(a, requires_grad=True),
            "expert": torch.ones(tokens, used, requires_grad=True),
            "output": torch.zeros_like(x, requires_grad=True),
        }
        f = torch.einsum("tkf,tkdf->tkd", a * leaves["neuron"] + leaves["hidden"], module.down_proj[ids])
        contributions = gates[..., None] * f
        self.leaves.append({**leaves, "ids": ids, "contributions": contributions.detach()})
        return (contributions * leaves["expert"][..., None]).sum(dim=1) + leaves["output"]

    def loss(self, tokens: list[int]) -> torch.Tensor:
        self.leaves.clear()
        logits = self.model(torch.tensor([tokens])).logits[0, :-1]
        loss: torch.Tensor = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="sum")
        return loss

    def sums(self, tokens: list[int]) -> list[dict[str, Doubles]]:
        """The backward accumulators of every layer in one window."""
        self.loss(tokens).backward()
        return [self._of_layer(leaves) for leaves in self.leaves]

    def _of_layer(self, leaves: dict[str, torch.Tensor]) -> dict[str, Doubles]:
        chosen = torch.nn.functional.one_hot(leaves["ids"], toys.EXPERTS).double()

        def slope(name: str) -> torch.Tensor:
            gradient = leaves[name].grad
            assert gradient is not None
            return gradient.double()

        def summed(values: torch.Tensor) -> Doubles:
            return torch.einsum("tke,tk...->e...", chosen, values).numpy()

        y = slope("output")
        return {
            "hidden_gradient_square": summed(slope("hidden") ** 2),
            "mask_gradient_sum": summed(slope("neuron")),
            "mask_gradient_square": summed(slope("neuron") ** 2),
            "expert_gradient_square": summed(slope("expert") ** 2),
            "loss_weighted_square": summed(((leaves["contributions"] * y[:, None]) ** 2).sum(dim=2).double()),
            "output_gradient_square": (y**2).sum(dim=0).numpy(),
        }


def test_gradients_equal_those_of_the_whole_model(both: Both) -> None:
    model = Differentiated(both.checkpoint)
    for window, tokens in enumerate(token_windows(toys.VOCABULARY)):
        for layer, wanted in enumerate(model.sums(tokens)):
            assert set(wanted) == set(BACKWARD)
            for name, want in wanted.items():
                got = both.torch.layers[layer][name][window]
                np.testing.assert_allclose(
                    got, want, rtol=1e-3, atol=1e-5 * np.abs(want).max(), err_msg=f"layer {layer}, {name}"
                )


def test_mask_fisher_foretells_what_a_factor_on_an_expert_does(both: Both) -> None:
    """The derivative behind the score, by finite differences: the loss with one expert's contribution scaled."""
    tokens, layer, expert, step = token_windows(toys.VOCABULARY)[0], 1, 3, 1e-2
    model = Differentiated(both.checkpoint)
    model.loss(tokens).backward()
    slopes = model.leaves[layer]["expert"].grad
    assert slopes is not None
    slope = float(slopes[model.leaves[layer]["ids"] == expert].sum())
    down = model.model.model.layers[layer].mlp.experts.down_proj
    losses = []
    for factor in (1 + step, 1 - step):
        own = down[expert].clone()
        down[expert] *= factor
        losses.append(float(model.loss(tokens).detach()))
        down[expert] = own
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=2e-2, abs=1e-3)


def test_scores_with_gradients_follow_their_formulas(both: Both) -> None:
    for sums in both.torch.layers.values():
        evidence = Evidence(0, sums)
        routed = sums.total("routed")
        # HEAPr as the paper writes it, mean by mean, and then by how often the expert is used.
        mean = (
            sums.total("hidden_square") / routed[:, None] * (sums.total("hidden_gradient_square") / routed[:, None])
        )
        np.testing.assert_allclose(SCORES["heapr"].score(evidence), routed * mean.sum(axis=1), rtol=1e-6)
        np.testing.assert_array_equal(SCORES["mask-fisher"].score(evidence), sums.total("expert_gradient_square"))
        np.testing.assert_array_equal(SCORES["gemq"].score(evidence), sums.total("loss_weighted_square"))


def test_heapr_quadratic_form_is_that_of_the_gradients_covariance() -> None:
    """w_k' G w_k with G from the gradients at the output equals the mean of the squared gradients at a_k."""
    random = np.random.default_rng(0)
    gradients, down = random.standard_normal((20, 6)), random.standard_normal((6, 4))
    covariance = gradients.T @ gradients / len(gradients)
    form = np.einsum("dk,de,ek->k", down, covariance, down)
    np.testing.assert_allclose(form, np.square(gradients @ down).mean(axis=0))


# Being killed, memory, and what it cannot run.


def test_a_killed_run_goes_on_with_the_layer_it_was_at(
    both: Both, toy_gguf: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output = toy_gguf(both.name), tmp_path / "torch.safetensors"
    computed: list[int] = []
    layer = Skeleton.layer

    def limited(self: Skeleton, index: int, hidden: torch.Tensor) -> torch.Tensor:
        computed.append(index)
        if len(computed) == limit:
            raise KeyboardInterrupt
        return layer(self, index, hidden)

    monkeypatch.setattr(Skeleton, "layer", limited)
    arguments: Any = (both.checkpoint, text(), output, tmp_path, weights_of(model), toys.EXPERTS, TOKENS, {"m": 1})
    for limit in (WINDOWS + 1, toys.LAYERS * WINDOWS + 2, 0):  # in the second layer, on the way back in the first
        computed.clear()
        if limit:
            with pytest.raises(KeyboardInterrupt):
                measure(*arguments)
        else:
            measure(*arguments)
            assert computed == [0] * WINDOWS  # of the first layer, which is the last backwards
    found = Statistics.load(output)
    for layer_index, sums in both.torch.layers.items():
        for name in (*FORWARD, *BACKWARD):
            np.testing.assert_array_equal(found.layers[layer_index][name], sums[name])
    assert [path.name for path in tmp_path.iterdir()] == ["torch.safetensors"]


def test_only_the_layer_at_work_has_weights(both: Both) -> None:
    checkpoint = open_checkpoint(both.checkpoint)
    skeleton = Skeleton(both.checkpoint, Parameters(checkpoint, converter_for(both.name), toys.EXPERTS))

    def real() -> int:
        return sum(p.numel() for p in skeleton.model.parameters() if not p.is_meta)

    assert real() == 0
    with skeleton.filled_layer(1):
        assert real() == sum(p.numel() for p in skeleton.layers[1].parameters())
    with skeleton.filled_output():
        assert 0 < real() <= 2 * toys.VOCABULARY * toys.WIDTH
    assert real() == 0


@cache
def other_model(name: str, **config: Any) -> Any:
    """A model of another family, random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **config)).eval()


OTHERS: dict[str, dict[str, Any]] = {
    # Shared experts, softmax without renormalisation.
    "qwen2_moe": {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 32, "num_experts": 8},
    # Sigmoid, groups, a selection bias, a dense layer first, and heads that are put together from parts.
    "deepseek_v3": {
        "moe_intermediate_size": 48, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "num_nextn_predict_layers": 0,
    },
    # Transposed and interleaved matrices, biases, an activation of its own, attention sinks, sliding windows.
    "gpt_oss": {"num_local_experts": 8, "head_dim": 16, "sliding_window": 16},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_run_layer_by_layer_as_they_do_whole(name: str, tmp_path: Path) -> None:
    """Families without a converter: what the layers give, and what is seen of their experts."""
    common = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
              "num_key_value_heads": 4 if name == "deepseek_v3" else 2, "num_experts_per_tok": 2, "vocab_size": 96,
              "max_position_embeddings": 128, "pad_token_id": 0}  # fmt: skip
    model = other_model(name, **common, **OTHERS[name])
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    skeleton = Skeleton(tmp_path, Parameters(checkpoint, converter_for("qwen3_moe"), 8))
    tokens = np.random.default_rng(0).integers(3, 90, 40).tolist()
    with torch.no_grad():
        whole = model(torch.tensor([tokens]), output_hidden_states=True)
    (hidden,) = skeleton.embedded([tokens])
    for index, layer in enumerate(skeleton.layers):
        with skeleton.filled_layer(index), Observer(layer) as observer, torch.no_grad():
            hidden = skeleton.layer(index, hidden)
        if index + 1 < len(skeleton.layers):
            torch.testing.assert_close(hidden, whole.hidden_states[index + 1], rtol=1e-4, atol=1e-5)
        assert (observer.routed is None) == (name == "deepseek_v3" and index == 0)
        if observer.routed is not None:
            assert observer.routed.h is not None
            assert observer.routed.ids.shape == (40, 2)
    with skeleton.filled_output(), torch.no_grad():
        loss = skeleton.loss(tokens, hidden)
    wanted = torch.nn.functional.cross_entropy(whole.logits[0, :-1], torch.tensor(tokens[1:]), reduction="sum")
    assert float(loss) == pytest.approx(float(wanted), rel=1e-4)


def damaged(checkpoint: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_a_checkpoint_with_other_layers_than_it_says_is_refused(toy_checkpoint: Toy, tmp_path: Path) -> None:
    folder = damaged(toy_checkpoint("qwen3_moe"), tmp_path / "more", num_hidden_layers=toys.LAYERS + 1)
    with pytest.raises(BadFile, match=r"lacks model\.layers\.2"):
        measure(folder, text(), tmp_path / "x", tmp_path, [], toys.EXPERTS, TOKENS, {"model": "toy"})


def test_a_configuration_that_transformers_does_not_take_is_explained(toy_checkpoint: Toy, tmp_path: Path) -> None:
    folder = damaged(toy_checkpoint("qwen3_moe"), tmp_path / "odd", hidden_act="no such thing")
    with pytest.raises(Unsupported, match="transformers cannot make a model"):
        measure(folder, text(), tmp_path / "x", tmp_path, [], toys.EXPERTS, TOKENS, {"model": "toy"})


def test_carried_activations_are_there_only_when_whole(tmp_path: Path) -> None:
    carried = Carried(tmp_path, [2, 3], 4)

    def broken() -> Iterator[torch.Tensor]:
        yield torch.zeros(1, 2, 4)
        raise OSError("cut off")

    with pytest.raises(OSError, match="cut off"):
        carried.write(engine.HIDDEN, 0, broken())
    assert not carried.has(engine.HIDDEN, 0)
    windows = [torch.randn(1, 2, 4), torch.randn(1, 3, 4)]
    carried.write(engine.HIDDEN, 0, iter(windows))
    assert carried.has(engine.HIDDEN, 0)
    for got, want in zip(carried.read(engine.HIDDEN, 0), windows, strict=True):
        torch.testing.assert_close(got, want)
