"""A finished run as something to pass on: checked against its own records, named, in files of allowed size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.build.builder import Build, digest_of_parts
from edgeprune.decide.plan import PRESET, Plan
from edgeprune.errors import BadFile, BrokenPromise, UsageError
from edgeprune.files import file_digest, read_json
from edgeprune.model.architecture import read_architecture
from edgeprune.model.gguf import GgufFile
from edgeprune.model.splitting import Part, file_name, split, split_sizes
from edgeprune.prove.report import Report
from edgeprune.share.index import Entry, Stored, entry_of
from edgeprune.share.origin import Origin, read_origin

# The Hub takes no larger file (its documentation, "Storage limits"); GB are 10^9.
LARGEST_FILE = 50 * 10**9
_LONGEST_STEM = 80
TO_BE_WRITTEN = "0" * 64  # stands for the SHA-256 of a part


@dataclass(frozen=True)
class Run:
    """Where a finished run keeps what is needed here.

    Attributes:
        folder: the run directory.
        plan, build, report, imatrix: files in it; the last may be missing.
        source: the model that it was made from, as the run was told.
    """

    folder: Path
    plan: Path
    build: Path
    report: Path
    imatrix: Path
    source: str


@dataclass(frozen=True)
class Release:
    """A checked run.

    Attributes:
        run: its files.
        report: with the file's published name.
        file: the GGUF.
        sha256: of the model, as ``Build`` has it.
        digests: SHA-256 of its file, or of its parts.
        name: of the GGUF where it is published, without ``.gguf``.
    """

    run: Run
    report: Report
    file: GgufFile
    sha256: str
    digests: tuple[str, ...]
    name: str

    @cached_property
    def origin(self) -> Origin:
        return read_origin(self.file, self.run.source)

    @cached_property
    def types(self) -> tuple[str, ...]:
        """Types of the matrices, those with most bytes first."""
        matrices = [self.file.tensors[name] for name, _ in self.report.types if name in self.file.tensors]
        return _by_bytes(matrices)

    def _built(self) -> list[Part]:
        paths = zip(self.file.paths, self.digests, strict=True)
        return [Part(path, path.stat().st_size, digest) for path, digest in paths]

    def parts(self, scratch: Path, most_bytes: int, progress: Callable[[int, int], None]) -> list[Part]:
        """The files as they are, or where one is larger than ``most_bytes``, parts in ``scratch``."""
        built = self._built()
        if all(part.nbytes <= most_bytes for part in built):
            return built
        return split(self.file.path, scratch, self.name, most_bytes, progress)

    def planned_parts(self, most_bytes: int) -> list[Part]:
        """What ``parts`` will be; ``TO_BE_WRITTEN`` is the SHA-256 of those that are not there yet."""
        built = self._built()
        if all(part.nbytes <= most_bytes for part in built):
            return built
        return [Part(self.file.path, nbytes, TO_BE_WRITTEN) for nbytes in split_sizes(self.file.path, most_bytes)]

    def stored(self, parts: Sequence[Part]) -> list[Stored]:
        """``parts`` as files of the repository."""
        count = len(parts)
        return [
            Stored(file_name(self.name, number, count), part.nbytes, part.sha256) for number, part in enumerate(parts)
        ]

    def entry(self, stored: Sequence[Stored]) -> Entry:
        return entry_of(
            self.report,
            self.name,
            stored,
            weights_bytes=sum(tensor.nbytes for tensor in self.file.tensors.values()),
            context_length=read_architecture(self.file).context_length,
            types=self.types,
        )


def _by_bytes(tensors: Sequence[Any]) -> tuple[str, ...]:
    weight: dict[str, int] = {}
    for tensor in tensors:
        weight[tensor.type] = weight.get(tensor.type, 0) + tensor.nbytes
    return tuple(sorted(weight, key=lambda name: (-weight[name], name)))


def file_stem(model: str) -> str:
    """The name of a model as it can stand in a file name."""
    plain = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in model)
    return plain.strip("-.")[:_LONGEST_STEM] or "model"


def release_name(file: GgufFile, plan: Plan, model: str) -> str:
    """``Model-K96-3.05bpw-IQ3_XXS``: what programs read from a name, and nothing that depends on other files.

    The last word is the type, where llama.cpp's ``-hf org/name:TYPE`` and the Hub look for it: that of most bytes of
    the experts. Experts are named where some were dropped, bits per weight where types are mixed.
    """
    words = [file_stem(model)]
    if plan.origin.startswith(PRESET):
        return "-".join([*words, plan.origin.removeprefix(PRESET)])
    architecture = read_architecture(file)
    if plan.keep:
        words.append(f"K{plan.kept}")
    if plan.width:
        words.append(f"F{plan.width}")
    if plan.types:
        weights = sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in architecture.tensors)
        words.append(f"{8 * file.size / weights:.2f}bpw")
    experts = [tensor for tensor in architecture.tensors if tensor.is_expert and tensor.quantisable]
    return "-".join([*words, *_by_bytes(experts or architecture.tensors)[:1]])


def open_release(run: Run, *, force: bool) -> Release:
    """The run in a folder, if it is finished and what is there is what was measured.

    Args:
        force: a broken promise is no obstacle.

    Raises:
        UsageError: the run is not finished.
        BrokenPromise: the report has broken promises.
        BadFile: the files do not belong to each other, or the GGUF is not the one that was measured.
    """
    for path in (run.plan, run.build, run.report):
        if not path.is_file():
            raise UsageError(
                f"{run.folder} is not a finished run directory: it has no {path.name}",
                hint="`edgeprune fit` makes one, and `edgeprune verify` finishes it",
            )
    plan, build = Plan.load(run.plan), _record(run.build, lambda value: Build(**value))
    report = _record(run.report, Report.from_json)
    if not report.build["sha256"] == report.made_from.get("build") == build.sha256:
        raise BadFile(
            f"the report in {run.folder} is about another file than the one there",
            rows=[("measured", report.build["sha256"][:12]), ("built", build.sha256[:12])],
            hint="`edgeprune verify` with the same options measures it",
        )
    if plan.digest != build.plan_digest:
        raise BadFile(f"{run.plan} is not the plan of the file there", hint="`edgeprune fit` with the same options")
    if report.broken and not force:
        raise BrokenPromise(
            f"{report.title}: {len(report.broken)} promise(s) broken",
            rows=[(p.name, f"predicted {p.predicted}, measured {p.measured}") for p in report.broken],
            hint="`--force` publishes it all the same; the card says so",
        )
    file = GgufFile(run.folder / Path(build.path).name)
    digests = tuple(file_digest(path) for path in file.paths)
    found = digest_of_parts(digests)
    if found != build.sha256:
        raise BadFile(
            f"{file.path} is not the file that was measured",
            rows=[("SHA-256 measured", build.sha256[:12]), ("SHA-256 now", found[:12])],
            hint="delete it and run the same `edgeprune fit` again",
        )
    name = release_name(file, plan, str(report.source["name"]))
    report = replace(report, provenance=report.provenance.shared())
    return Release(run, _renamed(report, file_name(name, 0, 1)), file, found, digests, name)


def _renamed(report: Report, name: str) -> Report:
    """``report`` of the same file, which is called ``name``."""
    old, made = str(report.build["path"]), report.provenance
    outputs = {name if output == old else output: sha256 for output, sha256 in made.outputs.items()}
    return replace(
        report,
        build={**report.build, "path": name},
        launch_line=report.launch.command(name),
        provenance=replace(made, outputs=outputs),
    )


def _record(path: Path, make: Callable[[Any], Any]) -> Any:
    """``make`` of the JSON value in ``path``.

    Raises:
        BadFile: it is something else.
    """
    try:
        return make(read_json(path))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise BadFile(
            f"{path} is not what edgeprune writes there: {error!r:.80}", hint="delete it and run again"
        ) from error


def distinct(releases: Sequence[Release]) -> list[Release]:
    """Each file once, and no two files of one name: two plans may be so near that their names are equal.

    Returns:
        largest first; of equal names the later ones with the beginning of their SHA-256.
    """
    found: dict[str, Release] = {}
    for release in releases:
        found.setdefault(release.sha256, release)
    ordered = sorted(found.values(), key=lambda release: (-release.file.size, release.sha256))
    taken: set[str] = set()
    result = []
    for release in ordered:
        if release.name in taken:
            head, _, kind = release.name.rpartition("-")
            name = f"{head}-{release.sha256[:8]}-{kind}"
            release = replace(release, name=name, report=_renamed(release.report, f"{name}.gguf"))
        taken.add(release.name)
        result.append(release)
    return result
