"""Fixtures around a Hub on loopback: the server, a user who is logged in there, and commands that talk to it.

A test module asks for them with ``pytest_plugins = ("publish_fixtures",)``.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hub_server import TOKEN, Command, HubServer, hub_server
from runs import environment, run_edgeprune

from edgeprune.cli import edgeprune


@pytest.fixture
def far() -> Iterator[HubServer]:
    with hub_server() as server:
        yield server


@pytest.fixture
def hub_environment(far: HubServer, tmp_path: Path) -> dict[str, str]:
    """Environment of a command whose Hub is the one on loopback; without Xet, which is a server of its own."""
    return environment(
        HF_ENDPOINT=far.address,
        HF_TOKEN=TOKEN,
        HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_XET="1",
        HF_HOME=str(tmp_path / "huggingface"),
    )


@pytest.fixture
def command(far: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """The command line in this process, which spares the start of one: what huggingface_hub read from the environment
    when it was imported is set to what ``hub_environment`` says."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", far.address)
    template = f"{far.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def run(*words: str | Path, **options: Any) -> Result:
        return CliRunner().invoke(edgeprune, [str(word) for word in words], **options)

    return run


@pytest.fixture
def real_command(hub_environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line in a process of its own."""

    def run(*words: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
        return run_edgeprune(*words, env={**hub_environment, **changes}, stdin=subprocess.DEVNULL)

    return run
