"""The model card: what was done to the model, what it cost, how to run it."""

from __future__ import annotations

from edgeprune.prove.report import Report
from edgeprune.units import format_bytes


def model_card(report: Report) -> str:
    """A README.md with the metadata that the Hugging Face Hub shows, as Markdown text."""
    plan = report.plan
    experts = (
        f"{plan['kept']} of {plan['experts']} experts per layer, chosen by {plan['method']}"
        if plan["keep"]
        else f"all {plan['experts']} experts per layer"
    )
    rows = [("**this file**", report.build["nbytes"], report.quality)]
    rows += [(f"stock {rival.preset}", rival.nbytes, rival.quality) for rival in report.baselines]
    lines = [
        "---",
        "library_name: gguf",
        "pipeline_tag: text-generation",
        "base_model_relation: quantized",
        "tags: [gguf, mixture-of-experts, edgeprune]",
        "---",
        "",
        f"# {report.title}",
        "",
        report.verdict,
        "",
        f"- Source: {report.source['name']} ({report.source['arch']}), {format_bytes(report.source['nbytes'])}",
        f"- Kept: {experts}",
        f"- File: `{report.build['path']}`, {report.build['nbytes']:,} bytes, SHA-256 `{report.build['sha256']}`",
        "",
        "## Run",
        "",
        "```",
        report.launch_line,
        "```",
        "",
        "## Measured against the source on held-out text",
        "",
        "| file | size | KL mean (nats/token) | KL 99 % | same top token | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for name, nbytes, quality in rows:
        lines.append(
            f"| {name} | {format_bytes(nbytes)} | {quality['kl_mean']:.5f} | {quality['kl_99']:.4f} "
            f"| {100 * quality['same_top']:.2f} % | {quality['perplexity']:.3f} |"
        )
    lines += [
        "",
        f"The source's perplexity on this text is {report.quality['reference_perplexity']:.3f}. "
        "`report.html` has the rest; `plan.json` says which experts and types.",
        "",
        "## Types",
        "",
        "```",
        *report.folded,
        "```",
        "",
    ]
    return "\n".join(lines)
