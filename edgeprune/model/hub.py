"""The Hugging Face Hub as a source: what a repository holds, where a file is, and what goes wrong on the way.

Everything goes through huggingface_hub, which knows ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HOME`` and
``HF_HUB_OFFLINE``. Only this module, ``download`` and ``remote`` use the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeprune import __version__
from edgeprune.errors import BadFile, EdgepruneError, UsageError
from edgeprune.model.location import HubName, endpoint, is_inside

if TYPE_CHECKING:
    from pathlib import Path

DEFAULT_REVISION = "main"
SECONDS_TO_ANSWER = 10.0


@dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    Attributes:
        path: within the repository, with slashes.
        size: bytes.
        digest: hexadecimal; SHA-256 of the content if ``large``, else git's SHA-1 of it as a blob. It is also the
            name of the file in the cache.
        large: kept apart from git, as weights are.
    """

    path: str
    size: int
    digest: str
    large: bool


@dataclass(frozen=True)
class Listing:
    """A repository at one commit.

    Attributes:
        commit: 40 hexadecimal digits.
        files: by path.
    """

    name: HubName
    commit: str
    files: dict[str, HubFile]


def is_offline() -> bool:
    """Whether the user asked for no network (``HF_HUB_OFFLINE``)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def list_files(name: HubName) -> Listing:
    """What the repository holds at the revision that was named; one request.

    Raises:
        UsageError: no such repository or revision.
        BadFile: an answer that makes no sense, such as a file outside the repository's folder.
        EdgepruneError: no access, no network.
    """
    from huggingface_hub import HfApi

    with explained(name):
        info = HfApi().model_info(
            name.repo, revision=name.revision or None, files_metadata=True, timeout=SECONDS_TO_ANSWER
        )
    commit = str(info.sha or "")
    if len(commit) != 40 or not set(commit) <= set("0123456789abcdef"):
        raise BadFile(f"the Hub names no commit for {name}")
    files = [_described(name, sibling) for sibling in info.siblings or ()]
    return Listing(name, commit, {file.path: file for file in files})


def _described(name: HubName, sibling: Any) -> HubFile:
    """One file of an answer of the Hub, which is not believed blindly: its names become paths here."""
    path, large = str(sibling.rfilename), sibling.lfs is not None
    digest = str(sibling.lfs.sha256 if large else sibling.blob_id)
    size = sibling.lfs.size if large else sibling.size
    if not is_inside(path):
        raise BadFile(f"{name.repo} lists a file outside its folder: {path[:80]!r}", hint="no honest repository does")
    if not isinstance(size, int) or size < 0 or len(digest) != (64 if large else 40) or not digest.isalnum():
        raise BadFile(f"{name.repo} lists {path[:80]} without size or digest")
    return HubFile(path, size, digest, large)


def address(listing: Listing, path: str) -> str:
    """URL of a file at the listing's commit."""
    from huggingface_hub import hf_hub_url

    return hf_hub_url(listing.name.repo, path, revision=listing.commit, endpoint=endpoint())


def request_headers(**further: str) -> dict[str, str]:
    """Headers of a request for bytes as they are, with the user's token if there is one."""
    from huggingface_hub.utils._headers import build_hf_headers

    own: dict[str, str] = build_hf_headers(library_name="edgeprune", library_version=__version__)
    return {**own, "Accept-Encoding": "identity", **further}


def cache_folder() -> Path:
    """Where huggingface_hub keeps what was downloaded (``HF_HOME``, ``HF_HUB_CACHE``)."""
    from pathlib import Path

    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repo_folder(name: HubName) -> Path:
    """The repository's folder in the cache: ``blobs``, ``snapshots``, ``refs``."""
    from huggingface_hub.file_download import repo_folder_name

    return cache_folder() / repo_folder_name(repo_id=name.repo, repo_type="model")


@contextmanager
def explained(name: HubName, path: str = "") -> Iterator[None]:
    """A block that talks to the Hub: what it can raise becomes one line and a way out.

    Args:
        path: the file that it is about, or "".

    Raises:
        UsageError: no such repository, revision or file.
        EdgepruneError: no access, no network, or the Hub is in trouble.
        Unreachable: there was no answer at all.
    """
    from huggingface_hub import errors
    from huggingface_hub.errors import HfHubHTTPError

    # The HTTP library below huggingface_hub is another one in other versions; its base class is not.
    transport: type[Exception] = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    try:
        yield
    except HfHubHTTPError as error:
        raise _refusal(name, path, error) from error
    except errors.HFValidationError as error:
        raise UsageError(f"{name.repo[:96]!r} is no name of a repository") from error
    except errors.OfflineModeIsEnabled as error:
        raise EdgepruneError(
            f"HF_HUB_OFFLINE forbids the network, which {name} needs",
            hint="unset HF_HUB_OFFLINE, or give a local path",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.FileMetadataError) as error:  # what answered is no Hub, or not now
        raise Unreachable(
            f"{endpoint()} does not say what {path} of {name} is", hint="the same command goes on where it was"
        ) from error
    except (transport, ConnectionError, TimeoutError) as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise Unreachable(
            f"cannot reach the Hub at {endpoint()} for {name}: {reason}",
            hint="check the network; the same command goes on where it was",
        ) from error


class Unreachable(EdgepruneError):
    """No answer from the Hub, or none that it could stand by: no network, a connection that was cut, a server in
    trouble. To try again may help."""


def _refusal(name: HubName, path: str, error: Any) -> EdgepruneError:
    """An answer of the Hub that is an error, explained."""
    from huggingface_hub import errors

    page = f"{endpoint()}/{name.repo}"
    what = f"{name.repo}{f'@{name.revision}' if name.revision else ''}"
    if isinstance(error, errors.GatedRepoError):
        return EdgepruneError(
            f"{name.repo} is gated, and this account has no access",
            hint=f"ask for access at {page}, then run `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, errors.DisabledRepoError):
        return EdgepruneError(f"{name.repo} was disabled by the Hub", hint=f"see {page}")
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(f"{name.repo} has no revision {name.revision or DEFAULT_REVISION}", hint=f"see {page}")
    if isinstance(error, errors.EntryNotFoundError):
        return UsageError(f"{what} has no file {path}", hint=f"see {page}/tree/{name.revision or DEFAULT_REVISION}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UsageError(
            f"no model {name.repo} on the Hub at {endpoint()}, and nothing at this path here",
            hint="check the spelling; for a private one run `hf auth login` or set HF_TOKEN",
        )
    status = error.response.status_code
    if status in (401, 403):
        return EdgepruneError(
            f"the Hub refuses access to {what} (HTTP {status})", hint="check HF_TOKEN, or run `hf auth login`"
        )
    if status == 429:
        return EdgepruneError(f"the Hub answers no more requests for now (HTTP 429) for {what}", hint="wait a while")
    kind = Unreachable if status >= 500 else EdgepruneError  # the first may pass
    return kind(f"the Hub answers HTTP {status} for {what}", hint="try again later; it goes on where it was")
