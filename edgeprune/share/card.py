"""The model card: what was done to the model, what it cost, how to run it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeprune.decide.plan import experts_in_words
from edgeprune.prove.provenance import UNKNOWN
from edgeprune.prove.report import EVALUATION, Report
from edgeprune.prove.tables import tables
from edgeprune.share.index import Entry
from edgeprune.share.origin import Origin
from edgeprune.units import format_bytes


@dataclass(frozen=True)
class Sheet:
    """One file of a card.

    Attributes:
        report: what was measured about it.
        folder: of its plan, report and pictures in the repository, or "" where they lie beside the card.
        pictures: path by caption.
        parts: names and SHA-256 of the file or its parts.
    """

    report: Report
    folder: str = ""
    pictures: Mapping[str, str] = field(default_factory=dict)
    parts: Sequence[tuple[str, str]] = ()

    @property
    def file(self) -> str:
        """The file that is loaded: the first part."""
        return self.parts[0][0] if self.parts else str(self.report.build["path"])

    def path(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name


def plain(text: Any) -> str:
    """``text`` as one line of Markdown that says what it says: a name may hold anything."""
    line = " ".join(str(text).split())
    for mark in ("\\", "`", "*", "_", "[", "]", "|", "#"):
        line = line.replace(mark, f"\\{mark}")
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _front_matter(sheets: Sequence[Sheet], origin: Origin, publisher: str) -> list[str]:
    """The metadata that the Hub reads. Values are JSON, which YAML contains."""
    pruned = any(sheet.report.plan["keep"] for sheet in sheets)
    licence = origin.licence
    values: dict[str, Any] = {
        "library_name": "gguf",
        "pipeline_tag": origin.pipeline,
        "base_model": list(origin.base_models),
        "base_model_relation": "quantized" if origin.base_models else "",  # to it
        "quantized_by": publisher,
        "license": licence.identifier if licence else "",
        "license_name": licence.name if licence else "",
        "license_link": licence.link if licence else "",
        "language": list(origin.languages),
        "tags": ["gguf", "mixture-of-experts", "edgeprune", *(["pruned"] if pruned else [])],
    }
    rows = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if value]
    return ["---", *rows, "---", ""]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _figures(quality: Mapping[str, Any]) -> list[str]:
    return [
        f"{quality['kl_mean']:.5f}",
        f"{quality['kl_99']:.4f}",
        f"{100 * quality['same_top']:.2f} %",
        f"{quality['perplexity']:,.3f}",
    ]


_FIGURES = ("KL mean (nats/token)", "KL 99 %", "same top token", "perplexity")


def _linked(file: str, folder: str) -> str:
    """The name of a file of the repository, leading to its report."""
    return f"[`{file}`]({folder}/report.html)"


def _files(sheets: Sequence[Sheet], others: Sequence[Entry]) -> list[str]:
    """The table of a repository's files, largest first."""
    rows = []
    for sheet in sheets:
        plan = sheet.report.plan
        needs = " + ".join(f"{format_bytes(n)} {pool.upper()}" for pool, n in sheet.report.needed_bytes.items())
        memory = f"{needs} at {sheet.report.launch.context:,}"
        kept = experts_in_words(plan)
        nbytes, quality = sheet.report.build["nbytes"], sheet.report.quality
        rows.append(
            (nbytes, [_linked(sheet.file, sheet.folder), kept, format_bytes(nbytes), memory, *_figures(quality)])
        )
    for entry in others:
        memory = f"{format_bytes(entry.memory.all_bytes)} at {entry.launch.context:,}"
        kept = experts_in_words({"kept": entry.kept, "experts": entry.experts, "width": entry.width})
        row = [
            _linked(entry.parts[0].path, entry.name),
            kept,
            format_bytes(entry.nbytes),
            memory,
            *_figures(entry.quality),
        ]
        rows.append((entry.nbytes, row))
    rows.sort(key=lambda row: -row[0])
    texts = {sheet.report.made_from.get(EVALUATION, "") for sheet in sheets} | {entry.text for entry in others}
    apart = ["Not all were measured on the same text: figures of different texts cannot be compared.", ""]
    header = ("file", "experts", "size", "memory at a context", *_FIGURES)
    return ["## Files", "", *_table(header, [row for _, row in rows]), "", *(apart if len(texts) > 1 else [])]


def _run(sheets: Sequence[Sheet], origin: Origin, repository: str) -> list[str]:
    lines = ["## Run", ""]
    if repository:
        lines += [
            "The best file for a machine, chosen and downloaded by edgeprune:",
            "",
            *("```", f"edgeprune pull {repository} --device auto", "```", ""),
            "or with stock llama.cpp:",
            "",
        ]
    for sheet in sheets:
        line = sheet.report.launch.command(sheet.file, repository)
        lines += ["```", " ".join([line, *origin.sampler_words]), "```", ""]
    if origin.sampler:
        said = ", ".join(f"`{option} {value:g}`" for option, value in origin.sampler.items())
        lines += [f"The sampler is what the source recommends: {said}.", ""]
    return lines


def _dropped(report: Report) -> list[str]:
    """Which experts are gone, by layer."""
    plan = report.plan
    if not plan["keep"]:
        return []
    everything = set(range(plan["experts"]))
    rows = [
        f"layer {layer}: {', '.join(map(str, sorted(everything - set(kept))))}"
        for layer, kept in sorted(plan["keep"].items(), key=lambda pair: int(pair[0]))
    ]
    return ["<details><summary>experts dropped</summary>", "", "```", *rows, "```", "", "</details>", ""]


def _about(sheet: Sheet, alone: bool) -> list[str]:
    """What was done for one file, and what was measured."""
    report = sheet.report
    plan = report.plan
    kept = (
        f"{plan['kept']} of {plan['experts']} experts per layer, chosen by {plain(plan['method'])}"
        if plan["keep"]
        else f"all {plan['experts']} experts per layer"
    )
    if plan.get("width"):
        kept += f", each narrowed to {plan['width']} channels, chosen by {plain(plan['narrowing'])}"
    lines = [f"## {'Measured' if alone else f'`{sheet.file}`'}", ""]
    lines += [] if alone else [plain(report.verdict), ""]
    lines.append(f"- Kept: {kept}")
    if report.shipped != "plan":
        lines.append(f"- It is the stock preset {plain(report.shipped)}: no plan of at most its size was better")
    parts = sheet.parts or [(sheet.file, report.build["sha256"])]
    lines += [f"- File: `{name}`, SHA-256 `{digest}`" for name, digest in parts]
    lines += [f"- {plain(name)}: {plain(value)}" for name, value in sorted(report.conditions.items())]
    lines += [
        "",
        "Against the source on held-out text, with stock presets of at most the same size:",
        "",
    ]
    rows = [["**this file**", format_bytes(report.build["nbytes"]), *_figures(report.quality)]]
    rows += [
        [f"stock {rival.preset}", format_bytes(rival.nbytes), *_figures(rival.quality)] for rival in report.baselines
    ]
    lines += _table(("file", "size", *_FIGURES), rows)
    if len(report.domains) > 1:
        rows = [[plain(name), *_figures(quality)] for name, quality in sorted(report.domains.items())]
        lines += ["", *_table(("domain", *_FIGURES), rows)]
    lines += ["", f"The source's perplexity on this text is {report.quality['reference_perplexity']:,.3f}.", ""]
    lines += _promises(report)
    lines += _on_request(report)
    for caption, path in sheet.pictures.items():
        lines += [f"![{caption}]({path})", ""]
    lines += _dropped(report)
    lines += _provenance(report)
    folded = [line.replace("`", "'") for line in report.folded]  # a tensor's name may hold anything, too
    lines += ["```", *folded, "```", ""]
    page, plan_file = sheet.path("report.html"), sheet.path("plan.json")
    lines += [
        f"[`report.html`]({page}) has the rest; [`plan.json`]({plan_file}) the experts and types.",
        "",
    ]
    return lines


_ON_REQUEST = {
    "speeds": "Speed with so many tokens in the context already; median, and least to most:",
    "tasks": "Questions with known answers, the same to the original; 95 % intervals, p is McNemar's:",
    "loops": "Long generations that loop; 95 % intervals:",
    "slices": "Text that nothing was chosen with:",
    "objects": "",
    "bases": "Against files of llama-perplexity:",
}


def _on_request(report: Report) -> list[str]:
    """What `verify` measured beyond a fit."""
    lines, found = [], tables(report)
    for name, title in _ON_REQUEST.items():
        table = found[name]
        if table.rows:
            lines += [title, ""] if title else []
            lines += [*_table(table.heads, [[plain(cell) for cell in row] for row in table.rows]), ""]
    return lines


def _provenance(report: Report) -> list[str]:
    """How the file was made: commands, digests, versions."""
    made = report.provenance
    if made == UNKNOWN:
        return []
    lines = ["<details><summary>how it was made</summary>", ""]
    if made.commands:
        lines += ["```", *(" ".join(command.split()).replace("`", "'") for command in made.commands), "```", ""]
    digests = [*sorted(made.inputs.items()), *sorted(made.outputs.items())]
    rows = [(plain(name), plain(value)) for name, value in digests]
    lines += [*_table(("in and out", "SHA-256"), rows), ""] if rows else []
    versions = [(plain(name), plain(value)) for name, value in sorted(made.versions.items())]
    lines += [*_table(("with", "version"), versions), ""] if versions else []
    return [*lines, "</details>", ""]


def _promises(report: Report) -> list[str]:
    if not report.broken:
        return []
    rows = [[plain(line.name), plain(line.predicted), plain(line.measured)] for line in report.broken]
    return ["**Broken promises:**", "", *_table(("", "predicted", "measured"), rows), ""]


def model_card(
    sheets: Sequence[Sheet],
    origin: Origin,
    repository: str = "",
    others: Sequence[Entry] = (),
    pictures: Mapping[str, str] | None = None,
    family_page: str = "",
) -> str:
    """A README.md with the metadata that the Hugging Face Hub shows, as Markdown text.

    Args:
        sheets: files of one source model.
        repository: where it is published, ``org/name``, or "" for a card that lies beside the file.
        others: files that the repository holds already.
        pictures: of all files, path by caption.
        family_page: path of the page that compares them, or "".
    """
    first = sheets[0].report
    alone = len(sheets) == 1 and not others
    title = first.title if alone else f"{first.source['name']}: GGUF files of several sizes"
    lines = _front_matter(sheets, origin, repository.partition("/")[0])
    lines += [f"# {plain(title)}", ""]
    lines += [plain(first.verdict), ""] if alone else []
    name = f"{plain(first.source['name'])} ({plain(first.source['arch'])})"
    linked = ", ".join(f"[{base}](https://huggingface.co/{base})" for base in origin.base_models)
    lines.append(f"- Source: {name}, {format_bytes(first.source['nbytes'])}{', from ' + linked if linked else ''}")
    if origin.licence is not None:
        whose = "as given by the publisher" if origin.licence_given else "that of the source"
        lines.append(f"- Licence, {whose}: {plain(origin.licence)}")
    lines += [f"- Tokenizer: {plain(text)[:300]}" for text in first.source.get("tokenizer_differences", [])]
    lines += ["- Made by edgeprune for stock llama.cpp: experts and types chosen together, measured, compared", ""]
    if repository:
        lines += _files(sheets, others)
        if family_page:
            lines += [f"[`{family_page}`]({family_page}) has them side by side.", ""]
    for caption, path in (pictures or {}).items():
        lines += [f"![{caption}]({path})", ""]
    lines += _run(sheets, origin, repository)
    for sheet in sheets:
        lines += _about(sheet, alone)
    return "\n".join(lines)
