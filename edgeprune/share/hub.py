"""The Hugging Face Hub: what a repository holds, sending files to it, and its refusals in one line.

Everything goes through huggingface_hub: tokens from its usual places, ``HF_ENDPOINT``, retries, LFS or Xet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import EdgepruneError, system_cause
from edgeprune.files import NO_ROOM

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_LONGEST_MESSAGE = 200
_AGAIN = "run the same command again; what has arrived is not transferred again"


@dataclass(frozen=True)
class Remote:
    """A repository as it is now.

    Attributes:
        exists: whether there is one that the token can see.
        branch: whether the revision that was asked for is there.
        head: its last commit, or "".
        files: SHA-256 of large files by path, and of small ones git's own.
        sizes: bytes by path.
        private: whether only its members see it.
    """

    exists: bool = False
    branch: bool = False
    head: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    private: bool = False


@dataclass(frozen=True)
class Request:
    """An open pull request: the revision that its commits go to, and its address."""

    revision: str
    address: str


@dataclass(frozen=True)
class Upload:
    """A file to be sent: its path in the repository, and where it is or what it holds.

    Attributes:
        sha256: if it is known already.
    """

    path: str
    content: Path | bytes
    nbytes: int
    sha256: str = ""


def _status(error: BaseException) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _from_network(error: BaseException) -> bool:
    """Whether it is of the HTTP library below huggingface_hub, which is not always the same one."""
    return isinstance(error, OSError) or any(kind.__module__.startswith("httpx") for kind in type(error).__mro__)


def _of_this_disk(error: BaseException) -> bool:
    """Whether it is of a file here, which huggingface_hub reads or writes, and not of the network."""
    # The system names the file, but for the one that a full disk has no room for; of a connection it names none.
    return isinstance(error, OSError) and (error.errno in NO_ROOM or error.filename is not None)


def _said(error: BaseException) -> str:
    """What the server said, on one line."""
    message = getattr(error, "server_message", None) or str(error)
    return " ".join(message.split())[:_LONGEST_MESSAGE]


def _explained(error: BaseException, repository: str) -> EdgepruneError | None:
    """The refusal as an error of ours, or None when it is none of the Hub's."""
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # around a failed upload
        return _explained(error.__cause__, repository)
    if isinstance(error, EdgepruneError):
        return error
    if isinstance(error, OSError) and _of_this_disk(error):
        way_out = "free some space" if error.errno in NO_ROOM else "see to that file"
        return EdgepruneError(system_cause(error), hint=f"{way_out}, or set HF_HOME to another folder, and {_AGAIN}")
    if isinstance(error, LocalTokenNotFoundError):
        return EdgepruneError("there is no token for the Hugging Face Hub", hint="`hf auth login`, or set HF_TOKEN")
    if isinstance(error, OfflineModeIsEnabled):
        return EdgepruneError("HF_HUB_OFFLINE is set: the Hub is not asked", hint="unset it")
    status = _status(error)
    refusals = {
        401: ("the Hub refuses the token", "`hf auth login` with a valid one, or set HF_TOKEN"),
        403: (f"the token may not do this to {repository}", "use a token with write access to it"),
        404: (f"the Hub has no {repository} that this token may see", "check the name"),
        409: (f"{repository} was changed by somebody else meanwhile", _AGAIN),
        412: (f"{repository} was changed by somebody else meanwhile", _AGAIN),
        429: ("the Hub asks to wait: too many requests", "wait some minutes, then " + _AGAIN),
    }
    if status in refusals:
        cause, hint = refusals[status]
        return EdgepruneError(cause, rows=[("the Hub", _said(error))], hint=hint)
    if status:
        return EdgepruneError(f"the Hub answered {status} about {repository}: {_said(error)}", hint=_AGAIN)
    if isinstance(error, ValueError):  # metadata that the Hub does not take, or an answer that makes no sense
        return EdgepruneError(f"the Hub does not take what {repository} was to be: {_said(error)}")
    if _from_network(error):
        return EdgepruneError(f"the Hub cannot be reached: {_said(error)}", hint=_AGAIN)
    return None


@contextmanager
def explained(repository: str) -> Iterator[None]:
    """A block that talks to the Hub about ``repository``: refusals and broken connections are explained.

    Raises:
        EdgepruneError: one line, with what the Hub said.
    """
    try:
        yield
    except Exception as error:
        ours = _explained(error, repository)
        if ours is None or ours is error:
            raise
        raise ours from error


class Hub:
    """The Hub, with the user's token.

    Args:
        quiet: no progress bars of huggingface_hub.
    """

    def __init__(self, *, quiet: bool) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils.tqdm import disable_progress_bars

        self.api: HfApi = HfApi(library_name="edgeprune")
        if quiet:
            disable_progress_bars()

    @cached_property
    def user(self) -> str:
        """The name that the token stands for.

        Raises:
            EdgepruneError: no token, or a bad one.
        """
        with explained("the user"):
            return str(self.api.whoami().get("name", ""))

    def look(self, repository: str, revision: str | None) -> Remote:
        """What ``repository`` holds at ``revision``; of a branch that is not there yet, what the main one holds."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        with explained(repository):
            branch = True
            try:
                info = self.api.model_info(repository, revision=revision)
            except RevisionNotFoundError:
                branch = False
                info = self.api.model_info(repository)
            except RepositoryNotFoundError as error:
                # The Hub answers 401 also about what a token must not see, and about what there is not.
                if _status(error) not in (401, 404):
                    raise
                return Remote()
            tree = list(self.api.list_repo_tree(repository, recursive=True, revision=info.sha))
            files = {each.path: _digest(each) for each in tree if hasattr(each, "size")}
            sizes = {each.path: int(each.size) for each in tree if hasattr(each, "size")}
            return Remote(True, branch, str(info.sha), files, sizes, bool(info.private))

    def open_request(self, repository: str, title: str, target: str | None) -> Request | None:
        """The user's own open pull request of that title to the branch ``target``; the latest of several."""
        with explained(repository):
            for found in self.api.get_repo_discussions(
                repository, author=self.user, discussion_type="pull_request", discussion_status="open"
            ):
                if found.title != title or not found.is_pull_request:
                    continue
                branch = self.api.get_discussion_details(repository, found.num).target_branch or ""
                if branch.removeprefix("refs/heads/") == (target or "main"):
                    return Request(str(found.git_reference), str(found.url))
        return None

    def base(self, repository: str) -> tuple[dict[str, Any], bool]:
        """Metadata of the model card of ``repository``, and whether access to it has to be asked for.

        Raises:
            EdgepruneError: there is no such model, or nobody may see it.
        """
        with explained(repository):
            info = self.api.model_info(repository)
            return (dict(vars(info.card_data)) if info.card_data else {}, bool(info.gated))

    def read(self, repository: str, path: str, revision: str, folder: Path | None = None) -> Path:
        """A copy of the file at ``path`` in ``folder``, or in huggingface_hub's cache; what is there is not fetched
        again, and a download that broke off goes on."""
        with explained(repository):
            return Path(self.api.hf_hub_download(repository, path, revision=revision, local_dir=folder))

    def missing(self, repository: str, paths: Sequence[str], revision: str) -> list[str]:
        """Those of ``paths`` that huggingface_hub's cache does not hold."""
        from huggingface_hub import try_to_load_from_cache

        found = {path: try_to_load_from_cache(repository, path, revision=revision) for path in paths}
        return [path for path, cached in found.items() if not isinstance(cached, str)]

    @property
    def cache(self) -> Path:
        """The folder of huggingface_hub's cache."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)

    def prepare(self, repository: str, revision: str | None, *, private: bool, remote: Remote) -> None:
        """Make the repository and the branch, if they are not there."""
        with explained(repository):
            if not remote.exists:
                self.api.create_repo(repository, private=private or None, exist_ok=True)
            if revision is not None and not remote.branch:
                self.api.create_branch(repository, branch=revision, exist_ok=True)

    def send(self, repository: str, upload: Upload, revision: str | None, *, create_pr: bool) -> Any:
        """Send one large file and return what ``commit`` needs of it; what the Hub has already is not sent."""
        with explained(repository):
            operation = _operation(upload)
            self.api.preupload_lfs_files(
                repository, [operation], revision=revision, create_pr=create_pr, free_memory=False
            )
            return operation

    def commit(
        self,
        repository: str,
        uploads: Sequence[Any],
        gone: Sequence[str],
        message: str,
        *,
        revision: str | None,
        create_pr: bool,
        parent: str,
    ) -> str:
        """One commit with everything; its address, or that of the pull request.

        Args:
            uploads: results of ``send``, and small files as ``Upload``.
            gone: paths to be deleted.
            parent: the commit that was looked at, so that nobody else's change is lost; "" for none.
        """
        from huggingface_hub import CommitOperationDelete

        operations = [_operation(each) if isinstance(each, Upload) else each for each in uploads]
        operations += [CommitOperationDelete(path) for path in gone]
        with explained(repository):
            made = self.api.create_commit(
                repository,
                operations,
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent or None,
            )
            return str(made.pr_url if create_pr else made.commit_url)


def _digest(file: Any) -> str:
    return str(file.lfs.sha256 if getattr(file, "lfs", None) else file.blob_id)


def _operation(upload: Upload) -> Any:
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(upload.path, upload.content)
    if upload.sha256:  # known, so that huggingface_hub does not read the whole file for it once more
        operation.upload_info.sha256 = bytes.fromhex(upload.sha256)
    return operation
