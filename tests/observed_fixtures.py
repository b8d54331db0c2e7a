"""Fixture for tests of what is measured on real routers."""

from __future__ import annotations

import pytest
from observed import FAMILIES, Family, Toy


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, toy_gguf: Toy, toy_checkpoint: Toy, tmp_path_factory: pytest.TempPathFactory
) -> Family:
    """One toy model of each family, measured."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    return Family(toy_gguf(name), toy_checkpoint(name), folder, renormalised=name != "olmoe")
