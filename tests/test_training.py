"""Training: the trained file answers as the trained student, and nearer to the original than the untrained one."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agreement import divergence, log_probabilities
from observed import LAUNCH, token_windows

from edgeprune.build.builder import build
from edgeprune.build.trained import write_trained
from edgeprune.decide.plan import Plan, Prediction
from edgeprune.errors import BadFile, UsageError
from edgeprune.measure.layerwise.distillation import save
from edgeprune.measure.layerwise.parameters import opened_parameters
from edgeprune.measure.layerwise.training import Recipe, Trainer
from edgeprune.model.architecture import read_architecture
from edgeprune.model.gguf import GgufFile
from edgeprune.settings import Settings

pytest_plugins = ("family_fixtures",)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "qwen3_next"])
def test_llama_cpp_answers_as_the_trained_student_does(made: Any, family: str, tmp_path: Path) -> None:
    checkpoint, model = made(family)
    file = GgufFile(model)
    architecture = read_architecture(file)
    half = architecture.experts // 2
    keep = {layer: tuple(range(1, 2 * half, 2)) for layer in architecture.moe_layers}
    windows = token_windows(architecture.vocabulary, 8)
    parameters, sizes = opened_parameters(checkpoint, architecture.experts)
    recipe = Recipe(rank=4, steps=6, batch=200, looks=2)
    trainer = Trainer(checkpoint, parameters, windows, keep, {}, set(file.tensors), tmp_path, recipe, device="cpu")
    trainer.teach()
    record = trainer.train()
    assert 0 < record.after < record.before and record.best
    save(trainer, parameters, sizes, keep, set(file.tensors), tmp_path / "learnt", {})
    counts = (architecture.experts, half)
    made_from = {"source": "toy", "healing": "toy", "training": "toy"}
    plan = Plan(
        architecture.arch, *counts, keep, {}, LAUNCH, "test", "user", Prediction(), made_from, heal=True, train=True
    )
    write_trained(str(model), plan.to_json(), str(tmp_path / "learnt"), str(tmp_path / "store"))
    output = tmp_path / "trained.gguf"
    build(str(model), plan.to_json(), str(output), merged=str(tmp_path / "store"))
    for index, place in enumerate(trainer.places):
        if place.shapes:
            place._mapped()[0].copy_(torch.from_numpy(np.fromfile(tmp_path / f"best-{index}.f32", np.float32)))
    held = trainer.held_out[0]
    last = list(trainer._forwards([held]))[-1][0]
    with trainer.skeleton.filled_output(), trainer.places[-1].used(), torch.no_grad():
        expected = trainer.skeleton.logits(last).double().log_softmax(-1)
    nats, same = divergence(expected, log_probabilities(output, [list(windows[held])]))
    assert nats < 1e-5 and same == 1.0


def test_a_look_at_held_out_windows_holds_one_layer(made: Any, tmp_path: Path) -> None:
    """What entered an earlier layer is gone when the next one is computed."""
    checkpoint, model = made("qwen3_moe")
    file = GgufFile(model)
    architecture = read_architecture(file)
    keep = {layer: (1, 3) for layer in architecture.moe_layers}
    parameters, _ = opened_parameters(checkpoint, architecture.experts)
    recipe = Recipe(rank=4, steps=2, batch=100, looks=1)
    windows = token_windows(architecture.vocabulary, 16)
    trainer = Trainer(checkpoint, parameters, windows, keep, {}, set(file.tensors), tmp_path, recipe, device="cpu")
    trainer.teach()
    entered: dict[int, list[weakref.ref[torch.Tensor]]] = {}
    layer, earlier = trainer.skeleton.layer, []

    def watched(index: int, hidden: torch.Tensor) -> torch.Tensor:
        entered.setdefault(index, []).append(weakref.ref(hidden))
        earlier.extend(own() is not None for before in range(index) for own in entered[before])
        return layer(index, hidden)

    trainer.skeleton.layer = watched  # type: ignore[method-assign]
    assert not trainer._restore()
    trainer._look(begin=True)
    assert len(trainer.held_out) > 1 and earlier and not any(earlier)


def test_contradictions_are_refused() -> None:
    for wishes in ({"heal": False}, {"reduce": "dern"}):
        with pytest.raises(UsageError):
            Settings("demo", file_bytes=1, train=True, **wishes).check()  # type: ignore[arg-type]
    with pytest.raises(BadFile):
        Plan("a", 8, 8, {}, {}, LAUNCH, "m", "user", Prediction(), {}, heal=True, train=True)
