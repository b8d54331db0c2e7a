"""Getting the right file back: of a repository's GGUFs the best that fits a device, fetched and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from edgeprune.decide.placement import place
from edgeprune.device.budget import Budget, make_budget
from edgeprune.device.profile import Profile
from edgeprune.errors import BadFile, DoesNotFit, EdgepruneError, Unsupported, UsageError
from edgeprune.files import require_space
from edgeprune.measure import memory
from edgeprune.measure.launch import Launch
from edgeprune.model import ggml
from edgeprune.model.architecture import read_architecture
from edgeprune.model.content import content_digest, git_digest
from edgeprune.model.gguf import GgufFile
from edgeprune.model.layout import layout
from edgeprune.model.parts import numbered
from edgeprune.share.hub import Hub, Remote
from edgeprune.share.index import INDEX, Entry, Memory, Stored, is_sound_path, read_index
from edgeprune.units import format_bytes

# Files that are no language models, by the names that the ecosystem gives them.
_OTHERS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-")
# Of a file of which nothing is known but its size: what llama.cpp may need beside the weights.
_UNKNOWN_SHARE, _UNKNOWN_BYTES = 0.05, 256 << 20


class Listener(Protocol):
    """Who hears what is done."""

    def say(self, text: str) -> None:
        """A line worth reading."""

    def progress(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """A stage that takes a while."""


@dataclass(frozen=True)
class Candidate:
    """A model of the repository.

    Attributes:
        name: without ``.gguf`` and the number of the part.
        parts: its files.
        memory: what it needs with ``launch``.
        types: GGML types, or none when they are not known.
        nats: KL divergence from its source, or None when nobody said.
        context_length: longest context, or 0.
        known: whether the figures are measured ones.
        text: digest of the text that ``nats`` were measured on, or "".
    """

    name: str
    parts: tuple[Stored, ...]
    memory: Memory
    launch: Launch
    types: tuple[str, ...]
    nats: float | None
    context_length: int
    known: bool
    text: str = ""

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate fits: the budget, and by how many bytes weights exceed it; negative when room is left."""

    candidate: Candidate
    launch: Launch
    budget: Budget
    short_bytes: int

    @property
    def fits(self) -> bool:
        return self.short_bytes <= 0

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.candidate.name,
            "nbytes": self.candidate.nbytes,
            "kl_mean": self.candidate.nats,
            "context": self.launch.context,
            "short_bytes": max(0, self.short_bytes),
            "fits": self.fits,
        }


@dataclass(frozen=True)
class Pulled:
    """A file that is there: the path that llama.cpp is given, and how it is run."""

    path: Path
    verdict: Verdict
    launch: Launch

    @property
    def launch_line(self) -> str:
        return self.launch.command(str(self.path))

    def to_json(self) -> dict[str, Any]:
        return {**self.verdict.to_json(), "path": str(self.path), "launch_line": self.launch_line}


def candidates(hub: Hub, repository: str, remote: Remote, listener: Listener) -> list[Candidate]:
    """The models in ``repository``: as its index lists them, or guessed from names and sizes.

    Raises:
        EdgepruneError: there is no such repository, or no GGUF in it.
    """
    if not remote.exists:
        raise EdgepruneError(
            f"the Hub has no {repository} that may be seen from here", hint="check the name; `hf auth login`"
        )
    found: list[Candidate] = []
    if INDEX in remote.files:
        entries, _ = read_index(hub.read(repository, INDEX, remote.head), f"{INDEX} of {repository}")
        found = [_of_entry(entry) for entry in entries if _is_there(entry, remote, listener)]
    else:
        listener.say(f"{repository} has no {INDEX}: files are judged by their names and sizes")
        found = _by_name(remote, listener)
    if not found:
        raise EdgepruneError(f"{repository} holds no GGUF model")
    return found


def _is_there(entry: Entry, remote: Remote, listener: Listener) -> bool:
    """Whether the repository still holds what its index says."""
    sound = all(
        remote.sizes.get(part.path) == part.nbytes and remote.files.get(part.path) == part.sha256
        for part in entry.parts
    )
    if not sound:
        listener.say(f"{entry.name} is left out: {INDEX} is about another file than the one there")
    return sound


def _of_entry(entry: Entry) -> Candidate:
    return Candidate(
        entry.name,
        entry.parts,
        entry.memory,
        entry.launch,
        entry.types,
        entry.quality["kl_mean"],
        entry.context_length,
        known=True,
        text=entry.text,
    )


def _by_name(remote: Remote, listener: Listener) -> list[Candidate]:
    """Models by the names of their files, each with all of its parts."""
    groups: dict[tuple[str, int], list[Stored]] = {}
    for path, nbytes in sorted(remote.sizes.items()):
        name = path.rpartition("/")[2]
        if not path.endswith(".gguf") or name.startswith(_OTHERS) or "imatrix" in name:
            continue
        if not is_sound_path(path):
            listener.say(f"left out, as not every system can have a file of that name: {path[:100]!r}")
            continue
        part = numbered(path)
        key = (part[0], part[2]) if part else (path.removesuffix(".gguf"), 1)
        groups.setdefault(key, []).append(Stored(path, nbytes, remote.files[path]))
    return [
        Candidate(name, tuple(parts), _guess(parts), Launch(), (), None, 0, known=False)
        for (name, count), parts in groups.items()
        if len(parts) == count and "mmproj" not in name
    ]


def _guess(parts: Iterable[Stored]) -> Memory:
    size = sum(part.nbytes for part in parts)
    return Memory(size, 0, int(size * _UNKNOWN_SHARE) + _UNKNOWN_BYTES, 0, 0)


@dataclass(frozen=True)
class Target:
    """Where the model is to run.

    Attributes:
        profile: of the device.
        memory_bytes: usable memory instead of the profile's, or None.
        context, kv_type: of the launch, or None for the profile's.
    """

    profile: Profile
    memory_bytes: int | None = None
    context: int | None = None
    kv_type: str | None = None

    def launch(self, candidate: Candidate) -> Launch:
        """How ``candidate`` is started there, before its weights are placed.

        Raises:
            UsageError: the context that was asked for is longer than the model's.
        """
        longest = candidate.context_length or (1 << 31)
        if self.context is not None and self.context > longest:
            raise UsageError(
                f"a context of {self.context} tokens is longer than the model's {longest}",
                hint=f"`--context {longest}` is the longest",
            )
        context = self.context or min(self.profile.context, longest)
        return Launch(context=context, kv_type=(self.kv_type or self.profile.kv_type).upper())

    def judge(self, candidate: Candidate) -> Verdict:
        """Whether ``candidate`` fits, by its own figures; the KV cache grows with the context and its type's bits.

        Exact where all layers see the whole context; a cache that slides over it needs less than is said here.
        """
        launch, needs = self.launch(candidate), candidate.memory
        wider = ggml.BY_NAME[launch.kv_type].bits_per_weight / ggml.BY_NAME[candidate.launch.kv_type].bits_per_weight
        cache = needs.kv_bytes * launch.context / candidate.launch.context * wider
        budget = make_budget(
            self.profile,
            kv_bytes=int(cache) + 1,
            compute_bytes=needs.compute_bytes,
            runtime_bytes=needs.runtime_bytes,
            host_compute_bytes=needs.host_compute_bytes,
            memory_bytes=self.memory_bytes,
            basis="figures of the repository's index" if candidate.known else "the size of the file",
        )
        room = budget.weights_bytes if len(budget.pools) > 1 else budget.pools[0].weights_bytes
        return Verdict(candidate, launch, budget, needs.weights_bytes - room)


def choose(
    verdicts: Sequence[Verdict], profile: Profile, repository: str, say: Callable[[str], None] = lambda _: None
) -> Verdict:
    """The best that fits: least divergence from the source where all were measured on one text, else the largest.

    Types that the device does not run well are taken only when nothing else fits.

    Args:
        say: hears that divergences are there and cannot be compared.

    Raises:
        DoesNotFit: none does; says of each by how much.
    """
    fitting = [verdict for verdict in verdicts if verdict.fits]
    if not fitting:
        smallest = min(verdicts, key=lambda verdict: verdict.short_bytes)
        label, total = smallest.budget.rows()[0]
        rows = [(f"memory ({label})", total)]
        rows += [(label, figure) for label, figure in smallest.budget.rows()[1:]]
        ordered = sorted(verdicts, key=lambda verdict: verdict.short_bytes)
        rows += [(f"{v.candidate.name}, short of", format_bytes(v.short_bytes)) for v in ordered]
        raise DoesNotFit(
            f"no file of {repository} fits {profile.name} with {smallest.launch.context:,} tokens of context",
            rows=rows,
            hint="a smaller `--context` or `--kv-type q8_0` frees memory; `edgeprune fit` makes a file that fits",
        )
    suited = [verdict for verdict in fitting if not set(verdict.candidate.types) & set(profile.avoid)] or fitting
    measured = [(v.candidate.nats, v.candidate.nbytes, v) for v in suited if v.candidate.nats is not None]
    texts = {verdict.candidate.text for verdict in suited}
    if len(measured) == len(suited) and len(texts) == 1 and "" not in texts:
        return min(measured, key=lambda row: row[:2])[2]
    if measured and len(suited) > 1:
        say("divergences of these files are not of one text: the largest that fits is taken")
    return max(suited, key=lambda verdict: verdict.candidate.nbytes)


def download(
    hub: Hub, repository: str, remote: Remote, verdict: Verdict, folder: Path | None, listener: Listener
) -> Path:
    """Fetch the chosen model's files and check every byte of them; the path of the first.

    Args:
        folder: where they go, or None for huggingface_hub's cache.

    Raises:
        BadFile: what arrived is not what the repository holds.
    """
    sizes = {part.path: part.nbytes for part in verdict.candidate.parts}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        missing = [name for name in sizes if not (folder / name).is_file()]
        others = [n for n in sizes if n not in missing and (folder / n).stat().st_size != sizes[n]]
        for name in others:
            listener.say(f"{folder / name} is another file, and is replaced")
        missing += others  # which stay until what replaces them has arrived
    else:
        missing = hub.missing(repository, list(sizes), remote.head)
    if missing:
        require_space(hub.cache if folder is None else folder, sum(sizes[name] for name in missing))
    paths = []
    for part in verdict.candidate.parts:
        with listener.progress(f"fetch {part.path}"):
            path = hub.read(repository, part.path, remote.head, folder)
        with listener.progress(f"check {part.path}") as progress:
            # Of a file that is not in large storage there is only git's own, which is shorter.
            found = content_digest(path, progress) if len(part.sha256) == 64 else git_digest(path)
            if path.stat().st_size != part.nbytes or found != part.sha256:
                _discard(path, folder)
                raise BadFile(
                    f"{part.path} arrived damaged: it is not what {repository} holds",
                    hint="it was deleted; run the same command again",
                )
        paths.append(path)
    return paths[0]


def _discard(path: Path, folder: Path | None) -> None:
    """Delete a damaged file, the cache's blob behind a link, too. What huggingface_hub notes in a ``folder`` stays:
    where that is the home folder, it lies beside the token and all models."""
    blob = path.resolve()
    path.unlink(missing_ok=True)
    if folder is None:
        blob.unlink(missing_ok=True)


def placed(path: Path, target: Target, verdict: Verdict) -> Launch:
    """How the file is started on the device, as llama.cpp itself prices it.

    A file in parts is left to llama.cpp's own placement on a device with a graphics card.

    Raises:
        DoesNotFit: the figures by which it was chosen were too good.
    """
    profile = target.profile
    try:
        file = GgufFile(path)
        architecture = read_architecture(file)
    except Unsupported:  # one part of several, or a model without experts
        return replace(verdict.launch, gpu_layers=-1 if profile.on_gpu else 0)
    launch = verdict.launch
    if 0 < architecture.context_length < launch.context and target.context is None:
        launch = replace(launch, context=architecture.context_length)
    whole = layout(file, architecture, architecture.experts, {}, [])
    needs = memory.price(whole, replace(launch, gpu_layers=-1 if profile.on_gpu else 0), architecture)
    budget = make_budget(
        profile,
        kv_bytes=needs.kv_bytes,
        compute_bytes=needs.compute_bytes,
        runtime_bytes=needs.runtime_bytes,
        host_compute_bytes=needs.host_compute_bytes,
        memory_bytes=target.memory_bytes,
        basis="as llama.cpp allocates them",
    )
    nbytes = {tensor.name: tensor.nbytes for tensor in architecture.tensors}
    found = place(architecture, architecture.experts, nbytes, budget, profile, launch)
    if found is None:
        raise DoesNotFit(
            f"{path} does not fit {profile.name} after all, as llama.cpp prices it",
            rows=[*budget.rows(), ("weights", format_bytes(sum(nbytes.values())))],
            hint="a smaller `--context` frees memory",
        )
    return found.launch
