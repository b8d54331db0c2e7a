"""Where a model comes from: the base model on the Hub, its licence, its languages, the sampler it recommends.

Read from what the source itself says: metadata that the GGUF carries (``general.*``, as llama.cpp's converters write
them), and of a checkpoint the front matter of its README and its generation configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeprune.errors import BadFile, EdgepruneError
from edgeprune.files import read_json
from edgeprune.model.gguf import GgufFile
from edgeprune.model.location import HubName, hub_name
from edgeprune.model.sampler import SAMPLERS

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
_HUB_ADDRESS = re.compile(rf"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/({_REPOSITORY.pattern})/?")
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{0,79}")  # of licences
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(?:-[A-Za-z0-9]{1,8})*")
_CACHED = re.compile(r"models--([^/\\]+)--([^/\\]+)")
_PIPELINE = "text-generation"
_LONGEST_TEXT = 300
_LARGEST_README = 1 << 20
_LARGEST = 1e300  # JSON has integers that no float holds
# Generation parameters: as transformers and as GGUF metadata call them, and llama-server's option.
_OPTIONS = {
    "temp": "--temp",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "min_p": "--min-p",
    "penalty_repeat": "--repeat-penalty",
}
_SAMPLERS = tuple((theirs, ours, _OPTIONS[ours]) for theirs, ours, _ in SAMPLERS)


@dataclass(frozen=True)
class Licence:
    """A licence as model cards name it.

    Attributes:
        identifier: of the Hub's list, ``apache-2.0`` for instance; ``other`` for one that is not on it.
        name, link: of a licence that is not on the list.
    """

    identifier: str
    name: str = ""
    link: str = ""

    @property
    def forbids_derivatives(self) -> bool:
        """Whether it is one of the Creative Commons that allow no changed copies."""
        return "nd" in self.identifier.split("-")

    @property
    def unknown(self) -> bool:
        """Whether its terms have to be read by a person."""
        return self.identifier in ("other", "unknown")

    def __str__(self) -> str:
        more = ", ".join(part for part in (self.name, self.link) if part)
        return f"{self.identifier} ({more})" if more else self.identifier


@dataclass(frozen=True)
class Origin:
    """What a model card says about the source.

    Attributes:
        base_models: repositories on the Hub, ``org/name``.
        licence: of the source, or None when it does not say.
        languages: codes such as ``en``.
        sampler: values by llama-server option.
        pipeline: the Hub's name of the task.
        licence_given: whether the publisher names the licence, and the source does not say it.
    """

    base_models: tuple[str, ...] = ()
    licence: Licence | None = None
    languages: tuple[str, ...] = ()
    sampler: Mapping[str, float] = field(default_factory=dict)
    pipeline: str = _PIPELINE
    licence_given: bool = False

    def over(self, other: Origin) -> Origin:
        """This one, and where it says nothing, ``other``."""
        return Origin(
            self.base_models or other.base_models,
            self.licence or other.licence,
            self.languages or other.languages,
            self.sampler or other.sampler,
            self.pipeline if self.pipeline != _PIPELINE else other.pipeline,
            self.licence_given if self.licence else other.licence_given,
        )

    @property
    def sampler_words(self) -> list[str]:
        """The sampler as words of a command line."""
        return [word for option, value in self.sampler.items() for word in (option, f"{value:g}")]


_DEMO = Origin(licence=Licence("apache-2.0"), languages=("en",))  # of the model that ships with the package


def is_repository(name: str) -> bool:
    """Whether ``name`` can be a repository on the Hub, ``org/name``."""
    return _REPOSITORY.fullmatch(name) is not None and ".." not in name and "--" not in name


def _text(value: Any) -> str:
    """``value`` if it is a text that fits on a line, or ""."""
    sound = isinstance(value, str) and value.isprintable() and len(value) <= _LONGEST_TEXT
    return value.strip() if sound else ""


def _texts(value: Any) -> list[str]:
    """One text or a list of them."""
    found = [_text(each) for each in (value if isinstance(value, list) else [value])]
    return [text for text in found if text]


def make_licence(identifier: Any, name: Any = "", link: Any = "") -> Licence | None:
    """The licence, or None where ``identifier`` is none."""
    known = _text(identifier).lower()
    if not _IDENTIFIER.fullmatch(known):
        return None
    address = _text(link)
    return Licence(known, _text(name), address if address.startswith(("https://", "http://")) else "")


def _repositories(value: Any) -> tuple[str, ...]:
    """The repositories that texts name, as ``org/name`` or by their address."""
    found = []
    for text in _texts(value):
        address = _HUB_ADDRESS.match(text)
        name = address[1] if address else text
        if is_repository(name):
            found.append(name)
    return tuple(dict.fromkeys(found))


def origin_of_gguf(file: GgufFile) -> Origin:
    """What the metadata of ``file`` say."""
    direct = _repositories(
        [file.get(f"general.source.{key}") for key in ("huggingface.repository", "repo_url", "url")]
    )
    count = file.get("general.base_model.count", 0)
    numbers = range(min(count, 16)) if isinstance(count, int) else range(0)
    based = _repositories([file.get(f"general.base_model.{number}.repo_url") for number in numbers])
    licence = make_licence(
        file.get("general.license"), file.get("general.license.name"), file.get("general.license.link")
    )
    languages = file.get("general.languages", [])
    sampler = {option: file.get(f"general.sampling.{key}") for _, key, option in _SAMPLERS}
    return Origin(direct[:1] or based, licence, _languages(languages), _sampler(sampler))


def _languages(value: Any) -> tuple[str, ...]:
    return tuple(text for text in _texts(value) if _LANGUAGE.fullmatch(text))[:64]


def _sampler(values: Mapping[str, Any]) -> dict[str, float]:
    """Those that are finite numbers."""
    return {
        option: float(value)
        for option, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
    }


def origin_of_card(metadata: Mapping[str, Any]) -> Origin:
    """What the front matter of a model card says about the model; its ``base_model`` is one generation further up."""
    licence = make_licence(metadata.get("license"), metadata.get("license_name"), metadata.get("license_link"))
    pipeline = _text(metadata.get("pipeline_tag"))
    known = pipeline if _IDENTIFIER.fullmatch(pipeline) else _PIPELINE
    return Origin((), licence, _languages(metadata.get("language")), {}, known)


def front_matter(readme: Path) -> dict[str, Any]:
    """The metadata at the head of a README; empty where there are none.

    Raises:
        BadFile: they are not what they should be.
    """
    from huggingface_hub.repocard import metadata_load

    if not readme.is_file():
        return {}
    if readme.stat().st_size > _LARGEST_README:
        raise BadFile(f"{readme} is too large for a model card: {readme.stat().st_size:,} bytes")
    try:
        return dict(metadata_load(readme) or {})
    except (OSError, ValueError, RecursionError) as error:
        raise BadFile(f"cannot read the metadata of {readme}: {' '.join(str(error).split())[:120]}") from None
    except Exception as error:  # of the YAML reader, which is the Hub's choice
        if type(error).__module__.split(".")[0] != "yaml":
            raise
        raise BadFile(f"cannot read the metadata of {readme}: {' '.join(str(error).split())[:120]}") from None


def origin_of_checkpoint(folder: Path) -> Origin:
    """What the checkpoint's README and generation configuration say; its repository, where the folder is of the Hub's
    cache.

    Raises:
        BadFile: one of them cannot be read.
    """
    found = origin_of_card(front_matter(folder / "README.md"))
    generation = folder / "generation_config.json"
    if generation.is_file():
        table = read_json(generation)
        if isinstance(table, dict) and table.get("do_sample", True) is True:
            found = replace(found, sampler=_sampler({option: table.get(key) for key, _, option in _SAMPLERS}))
    cached = [match for part in folder.parts if (match := _CACHED.fullmatch(part))]
    if cached:
        found = replace(found, base_models=_repositories(f"{cached[-1][1]}/{cached[-1][2]}"))
    return found


def read_origin(file: GgufFile, source: str) -> Origin:
    """Where a built file comes from.

    Args:
        source: the model that the run directory belongs to, a path or a name on the Hub; of a checkpoint, what lies
            in its folder, or in the Hub's cache, is read too.

    Raises:
        BadFile: a model card or a configuration cannot be read.
    """
    own, folder = origin_of_gguf(file), Path(source)
    if source == "demo":
        return own.over(_DEMO)
    if source and folder.is_dir():
        return origin_of_checkpoint(folder).over(own)
    named = hub_name(source)
    if named is None:
        return own
    repository = Origin(base_models=(named.repo,))
    if named.wanted:  # somebody's GGUF says what it was made from
        return own.over(repository)
    return repository.over(_cached(named)).over(own)


def _cached(name: HubName) -> Origin:
    """What is known of a checkpoint of the Hub that was downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name.repo, "config.json", revision=name.revision or None)
    return origin_of_checkpoint(Path(found).parent) if isinstance(found, str) else Origin()


def check_same_licence(named: Licence, found: Licence) -> None:
    """Refuse to call a licence the source's that is not; one "of its own" has no other name to be held against.

    Args:
        named: by the publisher.
        found: what the source says.

    Raises:
        EdgepruneError: names both.
    """
    if named.identifier != found.identifier and not found.unknown:
        raise EdgepruneError(
            f"--license says {named}, and the source says {found}",
            hint="leave --license out to publish under the source's; where you may choose another, `--force`",
        )


def check_licence(origin: Origin, gated: str, *, read: bool) -> None:
    """Refuse what should not be passed on without a person having read the terms.

    Args:
        gated: the base model on the Hub to which access has to be asked for, or "".
        read: somebody named the licence, and so has read it.

    Raises:
        EdgepruneError: says why, and what to do.
    """
    licence = origin.licence
    if licence is None:
        raise EdgepruneError(
            "the source names no licence, and without one nobody may use the model",
            hint="name it by `--license apache-2.0` or whichever it is",
        )
    if licence.forbids_derivatives:
        raise EdgepruneError(
            f"the licence of the source is {licence}, which forbids to pass on changed copies",
            hint="ask its authors; with their permission `--force`",
        )
    if licence.unknown and not read:
        raise EdgepruneError(
            f"the licence of the source is '{licence}': whether changed copies may be passed on is in its text",
            hint="read it, then name it by `--license` (with `--license-name` and `--license-link`), or `--force`",
        )
    if gated and not read:
        raise EdgepruneError(
            f"the base model {gated} is gated: who downloads it agrees to terms, which a copy goes around",
            hint="read the terms; where they allow it, name the licence by `--license`, or `--force`",
        )
