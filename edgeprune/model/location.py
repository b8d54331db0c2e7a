"""Where a model is that the user named: a path on this machine, or a repository on the Hugging Face Hub.

    ORG/NAME[@REVISION]                a checkpoint
    ORG/NAME:FILE[@REVISION]           a GGUF file of the repository, or one part of a split one
    ORG/NAME:QUANT[@REVISION]          the GGUF whose name ends in this quantisation, such as Q4_K_M

A path that exists is never taken for a repository. The address of a repository, or of a GGUF in it, as a browser
shows it, is its name, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgeprune.errors import UsageError

_NAMED = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<wanted>[^@]+))?(?:@(?P<revision>[^@]+))?", re.ASCII
)
_ADDRESS = re.compile(
    r"/(?P<repo>[^/?#]+/[^/?#]+)(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#]+)(?:/(?P<file>[^?#]+))?)?/?(?:[?#].*)?"
)
_PUBLIC_HUB = "https://huggingface.co"
LONGEST_REPO = 96  # characters, by the Hub
HINT = "give `demo`, a checkpoint folder, a GGUF file, or a model on the Hub: ORG/NAME, ORG/NAME:Q4_K_M"


@dataclass(frozen=True)
class HubName:
    """A model on the Hub.

    Attributes:
        repo: ``ORG/NAME``.
        wanted: a file of it or a quantisation, or "" for the checkpoint.
        revision: a branch, tag or commit, or "" for the default branch.
    """

    repo: str
    wanted: str = ""
    revision: str = ""

    def __str__(self) -> str:
        wanted = f":{self.wanted}" if self.wanted else ""
        return f"{self.repo}{wanted}{f'@{self.revision}' if self.revision else ''}"

    @property
    def short(self) -> str:
        """A name for files and folders: the repository's own, and what is wanted of it."""
        name, wanted = self.repo.split("/")[1], PurePosixPath(self.wanted).name
        return f"{name}-{wanted.removesuffix('.gguf')}" if wanted else name


def endpoint() -> str:
    """The address of the Hub that is used (``HF_ENDPOINT``)."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def is_inside(path: str) -> bool:
    """Whether ``path``, with slashes, stays within the folder that it is relative to, on any system."""
    parts = path.split("/")
    plain = not any(c in path for c in "\\:\0") and path.isprintable()
    return bool(path) and plain and not any(part in ("", ".", "..") for part in parts)


def hub_name(text: str) -> HubName | None:
    """The model on the Hub that ``text`` may name, or None if it cannot be one."""
    match = _NAMED.fullmatch(text)
    if match is None or len(match["repo"]) > LONGEST_REPO or "--" in match["repo"] or ".." in match["repo"]:
        return None
    found = HubName(match["repo"], match["wanted"] or "", match["revision"] or "")
    looks_like_file = found.repo.endswith((".gguf", ".safetensors")) and not (found.wanted or found.revision)
    inside = all(is_inside(part) for part in (found.wanted, found.revision) if part)
    return found if inside and not looks_like_file else None


def _without_address(text: str) -> str:
    """The name of what ``text`` is the address of, at the Hub that is used or at the public one; else ``text``."""
    if not text.startswith(("http://", "https://")):
        return text
    host = next((host for host in (endpoint().rstrip("/"), _PUBLIC_HUB) if text.startswith(f"{host}/")), None)
    match = _ADDRESS.fullmatch(text.removeprefix(host)) if host is not None else None
    if match is None:
        return text
    file, revision = match["file"] or "", match["revision"] or ""
    wanted = f":{file}" if file.endswith(".gguf") else ""
    return f"{match['repo']}{wanted}{f'@{revision}' if revision not in ('', 'main') else ''}"


def located(text: str) -> Path | HubName:
    """The path that ``text`` is if something is there, else the model on the Hub that it names.

    Raises:
        UsageError: it is neither.
    """
    path = Path(text)
    if path.exists():
        return path
    found = hub_name(_without_address(text))
    if found is None:
        raise UsageError(f"no model at {text}", hint=HINT)
    return found
