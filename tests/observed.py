"""Toy models measured twice: through llama.cpp's eval callback, and by transformers with everything written out."""

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

from edgeprune.measure import calibration, llama
from edgeprune.measure.arena import Arena
from edgeprune.measure.collector import Collector
from edgeprune.measure.launch import Launch
from edgeprune.measure.merging import merge
from edgeprune.measure.statistics import RATIO_BINS, Statistics
from edgeprune.model.architecture import read_architecture
from edgeprune.model.gguf import GgufFile

Toy = Callable[[str], Path]
Doubles = npt.NDArray[np.float64]
TOKENS, WINDOWS = 48, 2
FAMILIES = ["qwen3_moe", "mixtral", "olmoe"]
LAUNCH = Launch(context=64, batch=64, threads=1, kv_type="F32")
KEPT = np.array([0, 7, 8, 30, 47])


def token_windows(vocabulary: int, count: int = WINDOWS, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(3, vocabulary - 16, TOKENS).tolist() for _ in range(count)]


def collected(
    model: Path,
    windows: list[list[int]],
    folder: Path,
    *,
    weights: frozenset[str] | None = None,
    only: range | None = None,
    listener: Callable[[str], None] | None = None,
) -> Collector:
    """The windows as one domain.

    Args:
        weights: instead of all; ``only``: layers, instead of all.
        listener: hears the name of every node that is computed.
    """
    architecture = read_architecture(GgufFile(model))
    names = frozenset(tensor.name for tensor in architecture.tensors if tensor.quantisable)
    collector = Collector(
        architecture.experts,
        Arena(folder),
        gates_input=architecture.arch == "llama4",
        capacity=len(KEPT) * len(windows),
        weights=names if weights is None else weights,
        only=only,
    )

    def observer(node: llama.Node, ask: bool) -> bool:
        if listener is None:
            return collector(node, ask)
        wanted = collector(node, ask)
        if not ask:
            listener(node.name)
            return wanted if node.name.startswith("ffn_moe_weighted") else True
        return True

    with pytest.MonkeyPatch.context() as patch:
        # Flash attention rounds keys and values to F16, which transformers does not.
        patch.setattr(llama, "FLASH_ATTENTION_ON", 0)
        opened = llama.Session(model, LAUNCH, observer)
    with contextlib.closing(opened):
        for tokens in windows:
            collector.kept = KEPT
            opened.run(tokens)
            collector.end_window()
    return collector


def statistics(collector: Collector, domain: str, made_from: dict[str, Any]) -> Statistics:
    layers, reservoirs = collector.layers(), collector.reservoirs()
    return Statistics([domain], TOKENS, TOKENS, layers, collector.moments, made_from, reservoirs)


class Expected:
    """The same sums from transformers: inputs and residual streams by hooks, the rest written out here."""

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
            if name.endswith((".mlp", "_proj", "lm_head", "post_attention_layernorm")) or name.count(".") == 2:
                module.register_forward_hook(self._keeper(name))
        with torch.no_grad():
            for tokens in windows:
                self.model(torch.tensor([tokens]))

    def _keeper(self, name: str) -> Callable[..., None]:
        def keep(_: Any, arguments: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if arguments and hasattr(arguments[0], "double"):
                self.inputs.setdefault(name, []).append(arguments[0].reshape(-1, arguments[0].shape[-1]).double())
            self.outputs.setdefault(name, []).append(first.reshape(-1, first.shape[-1]).double())

        return keep

    @cache  # noqa: B019 - one instance a family
    def layer(self, layer: int, window: int) -> dict[str, Doubles]:
        """The accumulators of one window, and what they were made of, token by token."""
        import torch

        block = self.model.model.layers[layer].mlp
        x = self.inputs[f"model.layers.{layer}.mlp"][window]
        h = self.inputs[f"model.layers.{layer}.post_attention_layernorm"][window]
        after = self.outputs[f"model.layers.{layer}"][window]
        z = x @ block.gate.weight.detach().double().T
        p = torch.softmax(z, dim=-1)
        chosen, ids = p.topk(toys.USED, dim=-1)
        g = chosen / chosen.sum(dim=-1, keepdim=True) if self.renormalised else chosen
        gate_up = block.experts.gate_up_proj.detach().double()[ids]  # [T, k, 2F, D]
        down = block.experts.down_proj.detach().double()[ids]
        gate, up = torch.einsum("tkfd,td->tkf", gate_up, x).chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        a = gate * sigmoid * up
        f = torch.einsum("tkdf,tkf->tkd", down, a)
        y = (g[..., None] * f).sum(dim=1)
        norm = f.norm(dim=-1)
        gated = g * norm
        turn = (1 - torch.cosine_similarity(h, h + y, dim=-1)).clamp(min=0)
        angle = 1 - torch.cosine_similarity(x[:, None], f, dim=-1)
        onehot = torch.nn.functional.one_hot(ids, toys.EXPERTS).double()  # [T, k, E]
        used = onehot.sum(dim=1)
        ones = torch.ones_like(g)
        hidden_scale = (g / h.norm(dim=-1, keepdim=True)) ** 2
        slope = sigmoid * (1 + gate * (1 - sigmoid)) * up

        def rows(values: Any, weights: Any = ones) -> Any:
            return torch.einsum("tke,tk,tkw->ew", onehot, weights, values)

        def each(values: Any) -> Any:
            return torch.einsum("tke,tk->e", onehot, values)

        def most(values: Any) -> Any:
            shape = (*onehot.shape, *values.shape[2:])
            spread = onehot.reshape(*onehot.shape, *[1] * (values.dim() - 2)).expand(shape)
            return (spread * values.unsqueeze(2)).amax(dim=(0, 1))

        ordered = g.sort(dim=-1, descending=True).values
        bins = ((ordered[:, 1:] / ordered[:, :1]) * RATIO_BINS).long().clamp(max=RATIO_BINS - 1)
        first = torch.nn.functional.one_hot(z.argmax(dim=-1), toys.EXPERTS).double()
        wide_x = x[:, None].expand(-1, toys.USED, -1)
        sums = {
            "tokens": torch.tensor(float(len(x))),
            "routed": each(ones),
            "prob_sum": each(chosen),
            "share_sum": each(g / g.sum(dim=-1, keepdim=True)),
            "gate_sum": each(g),
            "gate_square": each(g**2),
            "factor_sum": each(g),
            "norm_sum": each(norm),
            "norm_square": each(norm**2),
            "gated_norm_sum": each(gated),
            "gated_square": each(gated**2),
            "norm_max": most(norm),
            "peak": most(f.abs().amax(dim=-1)),
            "angle_sum": each(gated * angle),
            "turn_sum": each(gated * turn[:, None]),
            "turn_tokens": torch.tensor(float(len(x))),
            "token_turn": turn.sum(),
            "token_full_turn": (1 - torch.cosine_similarity(h, after, dim=-1)).sum(),
            "token_ratio": (y.norm(dim=-1) ** 2 / h.norm(dim=-1) ** 2).sum(),
            "turn_histogram": torch.bincount(
                (turn * (RATIO_BINS / 2)).long().clamp(max=RATIO_BINS - 1), minlength=RATIO_BINS
            ),
            "top_logit_sum": (first * z).sum(dim=0),
            "chosen_logit_sum": (used * z).sum(dim=0),
            "ratio_histogram": torch.nn.functional.one_hot(bins, RATIO_BINS).sum(dim=0).double(),
            "together": used.T @ used,
            "logit_gram": z.T @ z,
            "logit_sum": z.sum(dim=0),
            "output_sum": rows(f),
            "gated_output_sum": rows(f, g),
            "output_square": rows(f**2),
            "hidden_square": rows(a**2),
            "hidden_abs": rows(a.abs()),
            "gated_hidden_square": rows(a**2, g**2),
            "gated_hidden_max": most(g[..., None] * a.abs()),
            "scaled_hidden_square": rows(a**2, hidden_scale),
            "gate_square_sum": rows(gate**2),
            "up_square_sum": rows(up**2),
            "gate_slope": rows(slope**2, g**2),
            "up_slope": rows((gate * sigmoid) ** 2, g**2),
            "input_square": rows(wide_x**2),
            "gated_input_square": rows(wide_x**2, g**2),
            # token by token
            "x": x, "y": y, "h": h, "z": z, "ids": ids, "gates": g, "probs": p, "f": f, "a": a,
            "residual": h.norm(dim=-1), "turn": turn,
        }  # fmt: skip
        return {name: np.asarray(value) for name, value in sums.items()}


class Family:
    """One toy model, its two windows measured apart and merged as two domains, and what transformers says."""

    def __init__(self, model: Path, checkpoint: Path, folder: Path, *, renormalised: bool) -> None:
        windows = token_windows(toys.VOCABULARY)
        self.expected = Expected(checkpoint, windows, renormalised=renormalised)
        self.parts = []
        for number, tokens in enumerate(windows):
            path = folder / f"{number}.safetensors"
            statistics(collected(model, [tokens], folder), "ab"[number], {"model": "toy"}).save(path)
            self.parts.append(path)
        merge(self.parts, folder / "both.safetensors", {"model": "toy", "text": "both"})
        self.both = Statistics.load(folder / "both.safetensors")


def text_statistics(model: Path, folder: Path, tokens: int, *, lines: int) -> Path:
    """Statistics of ``model`` over the first ``tokens`` of so many lines of training text, all of them kept whole."""
    architecture = read_architecture(GgufFile(model))
    text = folder / "text.txt"
    text.write_text("".join(toys.training_lines()[:lines]), encoding="utf-8")
    calibration.collect(
        str(model),
        str(folder / "statistics"),
        scratch=str(folder),
        texts=[{"domain": "a", "path": str(text), "split": "calibration"}],
        window=64,
        most_tokens=tokens,
        weights=[t.name for t in architecture.tensors if t.is_expert],
        experts=architecture.experts,
        arch=architecture.arch,
        made_from={"model": model.name},
        reservoir_tokens=tokens,
    )
    return folder / "statistics"
