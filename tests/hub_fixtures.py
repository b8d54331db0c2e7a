"""Fixtures for tests that read from a Hub on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hub_files
import pytest
from huggingface_hub import close_session, constants

from edgeprune.model import download


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[hub_files.Hub]:
    """An empty Hub, and huggingface_hub in this process (and in commands) talking to it, with an empty cache."""
    with hub_files.serving() as served:
        cache = tmp_path / "huggingface"
        environment = {
            "HF_ENDPOINT": served.url,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        # huggingface_hub reads the environment once, when it is loaded.
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        monkeypatch.setattr(download, "PATIENCE_SECONDS", (0.0, 0.0))
        yield served
        close_session()
