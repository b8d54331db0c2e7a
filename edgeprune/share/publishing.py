"""Publishing: from finished runs to the files of a repository, and sending those that are not there yet."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from edgeprune.errors import BadFile, EdgepruneError, UsageError
from edgeprune.files import file_digest, to_json
from edgeprune.model.splitting import Part
from edgeprune.prove import figures
from edgeprune.prove.family import Member, make_family
from edgeprune.prove.page import render, render_family
from edgeprune.prove.pictures import standalone
from edgeprune.share.card import Sheet, model_card
from edgeprune.share.hub import Hub, Remote, Request, Upload
from edgeprune.share.index import INDEX, Entry, index_text, read_index
from edgeprune.share.origin import (
    Licence,
    Origin,
    check_licence,
    check_same_licence,
    is_repository,
    origin_of_card,
)
from edgeprune.share.release import LARGEST_FILE, TO_BE_WRITTEN, Release, Run, distinct, open_release

CARD, FAMILY_PAGE = "README.md", "family.html"


class Listener(Protocol):
    """Who hears what is done."""

    def say(self, text: str) -> None:
        """A line worth reading."""

    def progress(self, title: str) -> contextlib.AbstractContextManager[Callable[[int, int], None]]:
        """A stage that takes a while."""


@dataclass(frozen=True)
class Wishes:
    """What the user asked for.

    Attributes:
        base_models, licence: instead of what the source says; a licence that is given counts as read.
        revision: branch, or None for the main one.
        private: the repository, if it is made now.
        create_pr: send a pull request.
        force: broken promises, forbidding licences and a card that somebody edited are no obstacle.
        largest_file: bytes beyond which a file is split.
    """

    base_models: tuple[str, ...] = ()
    licence: Licence | None = None
    revision: str | None = None
    private: bool = False
    create_pr: bool = False
    force: bool = False
    largest_file: int = LARGEST_FILE


@dataclass(frozen=True)
class Publication:
    """What a repository is to be.

    Attributes:
        uploads: all files; GGUFs first.
        gone: paths that are to be deleted.
        card: the README, whether it is sent or not.
        there: paths of ``uploads`` that the repository holds already, byte for byte.
        replaced: paths of ``uploads`` where the repository holds something else.
    """

    repository: str
    uploads: tuple[Upload, ...]
    gone: tuple[str, ...]
    card: str
    there: frozenset[str]
    replaced: frozenset[str] = frozenset()

    @property
    def to_send(self) -> list[Upload]:
        return [upload for upload in self.uploads if upload.path not in self.there]

    def to_json(self) -> dict[str, Any]:
        return {
            "repository": self.repository,
            "files": [
                {
                    "path": upload.path,
                    "nbytes": upload.nbytes,
                    "there": upload.path in self.there,
                    "replaces": upload.path in self.replaced,
                }
                for upload in self.uploads
            ],
            "deleted": list(self.gone),
            "card": self.card,
        }


@dataclass
class Publisher:
    """One publication under way.

    Args:
        hub: None to ask nobody: then everything counts as not there.
    """

    repository: str
    wishes: Wishes
    listener: Listener
    hub: Hub | None
    releases: list[Release] = field(default_factory=list)
    remote: Remote = field(default_factory=Remote)
    origin: Origin = field(default_factory=Origin)
    entries: list[Entry] = field(default_factory=list)
    known_card: str = ""
    request: Request | None = None

    def __post_init__(self) -> None:
        for name in (self.repository, *self.wishes.base_models):
            if not is_repository(name):
                raise UsageError(f"'{name}' is not a repository on the Hub", hint="write organisation/name")

    def open(self, runs: Sequence[Run]) -> None:
        """Check the runs, look at the repository and at the base model.

        Raises:
            EdgepruneError: something is not fit to be published; says what.
        """
        with self.listener.progress("check"):
            self.releases = distinct([open_release(run, force=self.wishes.force) for run in runs])
        sources = {str(release.report.plan["made_from"].get("source")) for release in self.releases}
        if len(sources) > 1:
            raise UsageError("these runs are of different models", hint="publish one model to one repository")
        for release in self.releases:
            if release.report.broken:
                names = ", ".join(promise.name for promise in release.report.broken)
                self.listener.say(f"{release.name}: broken promises are published as asked: {names}")
        self.remote = self.hub.look(self.repository, self.wishes.revision) if self.hub else Remote()
        if self.wishes.private and self.remote.exists and not self.remote.private:
            raise UsageError(
                f"{self.repository} is there already, and everybody can see it",
                hint="make it private in its settings on the Hub, publish to another name, or leave out --private",
            )
        self._find_request()
        self._read_remote_index()
        self._find_origin()

    @property
    def _title(self) -> str:
        """Of the commit, or of the pull request."""
        return f"{', '.join(release.name for release in self.releases)} by edgeprune"

    def _find_request(self) -> None:
        """Go on with the pull request that an earlier publication of the same opened, if it still is."""
        if self.hub is None or not self.wishes.create_pr or not self.remote.exists:
            return
        self.request = self.hub.open_request(self.repository, self._title, self.wishes.revision)
        if self.request is not None:
            self.listener.say(f"goes on with the pull request that is open already: {self.request.address}")
            self.wishes = replace(self.wishes, create_pr=False, revision=self.request.revision)
            self.remote = self.hub.look(self.repository, self.request.revision)

    def _read_remote_index(self) -> None:
        """What earlier publications put there, which stays."""
        if self.hub is None or INDEX not in self.remote.files:
            return
        path = self.hub.read(self.repository, INDEX, self.remote.head)
        try:
            self.entries, self.known_card = read_index(path, f"{INDEX} of {self.repository}")
        except BadFile as error:
            if not self.wishes.force:
                raise BadFile(error.cause, hint="`--force` replaces it") from error
            self.listener.say(f"{error.cause}; it is replaced")

    def _find_origin(self) -> None:
        own = Origin(self.wishes.base_models, self.wishes.licence)
        found = Origin()
        for release in self.releases:
            own, found = own.over(release.origin), found.over(release.origin)
        gated = ""
        for base in own.base_models if self.hub else ():
            try:
                metadata, closed = self.hub.base(base) if self.hub else ({}, False)
            except EdgepruneError as error:
                if not self.wishes.force:
                    hint = "name it by `--base-model org/name`, or `--force`"
                    raise EdgepruneError(f"the base model: {error.cause}", rows=error.rows, hint=hint) from error
                self.listener.say(f"the base model: {error.cause}")
                continue
            own, found = own.over(origin_of_card(metadata)), found.over(origin_of_card(metadata))
            gated = base if closed else gated
        self.origin = replace(own, licence_given=self._licence_is_given(found))
        if not own.base_models:
            self.listener.say("the card names no base model, as the source does not; `--base-model org/name` does")
        try:
            check_licence(own, gated, read=self.wishes.licence is not None)
            if found.licence is not None and found.licence.forbids_derivatives:  # whatever was named by hand
                check_licence(found, "", read=True)
            if self.wishes.licence is not None and found.licence is not None:
                check_same_licence(self.wishes.licence, found.licence)
        except EdgepruneError as error:
            if not self.wishes.force:
                raise
            self.listener.say(f"published as asked, though {error.cause}")

    def _licence_is_given(self, found: Origin) -> bool:
        """Whether the licence is what was typed, and the source does not say so."""
        named, said = self.wishes.licence, found.licence
        if named is None:
            return False
        return said is None or said.unknown or said.identifier != named.identifier

    def planned(self) -> Publication:
        """What would be sent."""
        return self._compose({r.name: r.planned_parts(self.wishes.largest_file) for r in self.releases})

    def send(self, scratch: Path) -> str:
        """Send what is not there, in one commit; its address, or that of the pull request.

        Args:
            scratch: a folder for the parts of split files, deleted in the end.

        Raises:
            EdgepruneError: the Hub refuses, or cannot be reached; run it again, and it goes on.
        """
        assert self.hub is not None
        parts = {}
        for release in self.releases:
            with self.listener.progress(f"split {release.name}") as progress:
                parts[release.name] = release.parts(scratch, self.wishes.largest_file, progress)
        publication = self._compose(parts)
        if not publication.to_send and not publication.gone:
            shutil.rmtree(scratch, ignore_errors=True)
            return self.request.address if self.request else ""
        wishes = self.wishes
        self.hub.prepare(self.repository, wishes.revision, private=wishes.private, remote=self.remote)
        ready: list[Any] = []
        for upload in publication.to_send:
            if isinstance(upload.content, Path):
                with self.listener.progress(f"send {upload.path}"):
                    ready.append(self.hub.send(self.repository, upload, wishes.revision, create_pr=wishes.create_pr))
            else:
                ready.append(upload)
        address = self.hub.commit(
            self.repository,
            ready,
            publication.gone,
            self._title,
            revision=wishes.revision,
            create_pr=wishes.create_pr,
            parent=self.remote.head if self.remote.branch else "",
        )
        shutil.rmtree(scratch, ignore_errors=True)
        return self.request.address if self.request else address

    def _compose(self, parts: Mapping[str, list[Part]]) -> Publication:
        """All files, with the GGUFs in ``parts`` by name of the release."""
        own = {release.name: release.entry(release.stored(parts[release.name])) for release in self.releases}
        others = [entry for entry in self.entries if entry.name not in own]
        uploads = [
            Upload(stored.path, part.path, part.nbytes, part.sha256)
            for name, entry in own.items()
            for stored, part in zip(entry.parts, parts[name], strict=True)
        ]
        sheets = []
        for release in self.releases:
            sheet, files = _details(release, own[release.name])
            sheets.append(sheet)
            uploads += files
        pictures = {}
        everything = sorted([*own.values(), *others], key=lambda entry: -entry.nbytes)
        if drawn := _curve(self.releases, everything):
            uploads.append(_bytes("curve.svg", drawn))
            pictures["File size against KL divergence"] = "curve.svg"
        if len(self.releases) > 1:
            members = [Member(release.name, release.report, beside=True) for release in self.releases]
            uploads.append(_bytes(FAMILY_PAGE, render_family(make_family(members, []))))
        page = FAMILY_PAGE if len(self.releases) > 1 else ""
        card = model_card(sheets, self.origin, self.repository, others, pictures, page)
        uploads.append(_bytes(INDEX, index_text(everything, hashlib.sha256(card.encode()).hexdigest())))
        if self._may_replace_card:
            uploads.append(_bytes(CARD, card))
        wanted = {upload.path for upload in uploads}
        stale = [entry for entry in self.entries if entry.name in own]
        gone = sorted({part.path for entry in stale for part in entry.parts} & self.remote.files.keys() - wanted)
        there = frozenset(upload.path for upload in uploads if _same(upload, self.remote.files.get(upload.path)))
        replaced = frozenset(u.path for u in uploads if u.path not in there and _is_other(u, self.remote))
        return Publication(self.repository, tuple(uploads), tuple(gone), card, there, replaced)

    @cached_property
    def _may_replace_card(self) -> bool:
        """Whether the README there is ours, as we left it."""
        if CARD not in self.remote.files or self.wishes.force or self.hub is None:
            return True
        path = self.hub.read(self.repository, CARD, self.remote.head)
        if hashlib.sha256(path.read_bytes()).hexdigest() == self.known_card:
            return True
        self.listener.say(f"the {CARD} there was written or changed by somebody; it stays (`--force` replaces it)")
        return False


def _bytes(path: str, text: str) -> Upload:
    content = text.encode()
    return Upload(path, content, len(content), hashlib.sha256(content).hexdigest())


def _same(upload: Upload, digest: str | None) -> bool:
    """Whether the repository holds the file, under ``digest``: SHA-256 of a large one, git's of a small one."""
    if digest is None or digest == upload.sha256:
        return digest is not None
    content = upload.content if isinstance(upload.content, bytes) else b""
    return bool(content) and digest == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_other(upload: Upload, remote: Remote) -> bool:
    """Whether the repository holds another file under that name; of a part that is still to be written the size is
    all that is known."""
    unknown = upload.sha256 == TO_BE_WRITTEN and remote.sizes.get(upload.path) == upload.nbytes
    return upload.path in remote.files and not unknown


def _details(release: Release, entry: Entry) -> tuple[Sheet, list[Upload]]:
    """The sheet of one file, and what lies in its folder: plan, report, pictures, importance matrix."""
    report, folder = release.report, release.name
    uploads = [
        Upload(f"{folder}/plan.json", content := release.run.plan.read_bytes(), len(content), _sha256(content)),
        _bytes(f"{folder}/report.json", to_json(report.to_json())),
        _bytes(f"{folder}/report.html", render(report)),
    ]
    pictures = {}
    if report.importance and report.plan["keep"]:
        picture = standalone(figures.keep_map(report.importance, report.plan["keep"]))
        uploads.append(_bytes(f"{folder}/keep-map.svg", picture))
        pictures["Experts by layer: importance, and which were kept"] = f"{folder}/keep-map.svg"
    if release.run.imatrix.is_file():
        # llama.cpp, looking for a model in a repository, passes over files with "imatrix" in their names.
        path = release.run.imatrix
        uploads.append(Upload(f"{folder}/imatrix.gguf", path, path.stat().st_size, file_digest(path)))
    parts = [(part.path, part.sha256) for part in entry.parts]
    return Sheet(report, folder, pictures, parts), uploads


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _curve(releases: Sequence[Release], entries: Iterable[Entry]) -> str:
    """The files of the repository in one picture, with the presets that were measured beside them and the candidates
    that they were chosen from."""
    entries = list(entries)
    presets = {rival["preset"]: rival for release in releases for rival in release.report.to_json()["baselines"]}
    points = [point for release in releases for point in release.report.curve]
    stem = _common(entry.name for entry in entries)
    shipped = {
        entry.name.removeprefix(stem) if len(entries) > 1 else "this file": (entry.nbytes, entry.quality["kl_mean"])
        for entry in entries
    }
    drawn = figures.curve(points, list(presets.values()), shipped)
    return standalone(drawn) if drawn else ""


def _common(names: Iterable[str]) -> str:
    """The words that all names begin with."""
    split = [name.split("-") for name in names]
    shared: list[str] = []
    for words in zip(*split, strict=False):
        if len(set(words)) > 1:
            break
        shared.append(words[0])
    return "-".join([*shared, ""]) if shared else ""
