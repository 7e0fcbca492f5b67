"""``results/README.md``: the claims, the main tables and a few figures on one page that a code host renders."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from analysis.claims import RULE, Claim, tally
from analysis.formats import pipe_table, value
from analysis.rendering import render
from analysis.runs import Run
from analysis.specs import FIGURES
from analysis.tables import Table, across

SHOWN = tuple(
    spec
    for name in (
        "plus_real_models",
        "methods_perplexity",
        "methods_zeroshot",
        "allocation",
        "variants_mlp",
        "calibration_size",
    )
    for spec in FIGURES
    if spec.name == name
)
"""The figures of the page."""


@dataclass(frozen=True)
class Extract:
    """A column of one or more tables, model by model: ``quantity`` of the tables named ``sources``."""

    sources: tuple[str, ...]
    quantity: str
    title: str
    note: str


EXTRACTS = (
    Extract(
        ("real_models_perplexity",),
        "30 %",
        "Released models: perplexity with 30 % removed",
        "What has no row was not run, or does not take the model; the full report has the commands.",
    ),
    Extract(
        ("methods_perplexity",),
        "30 %",
        "Small models: perplexity with 30 % removed",
        "Methods that remove whole layers removed more; the full report has the table.",
    ),
    Extract(
        ("real_models_retention", "methods_retention"),
        "30 %",
        "Share of the dense zero-shot accuracy that is kept with 30 % removed (%)",
        "Mean over five tasks: the paper's on the released model, those made for them on the tiny ones.",
    ),
    Extract(
        ("plus_real_models", "plus_excess"),
        "Less than entropic (%)",
        "MoDeGPT plus: how much less log-perplexity it adds than the paper's method (%)",
        "Per cent of the paper's excess log-perplexity over the dense model that `modegpt_plus` does not have, seed by "
        "seed; both with the same calibration tokens and budget, the paper's method with its entropic allocation.",
    ),
    Extract(
        ("compression_cost",),
        "Counted TFLOPs",
        "Counted TFLOPs of a compression by 30 %",
        "Nothing cached, nothing scored.",
    ),
)
SOURCES = tuple(name for each in EXTRACTS for name in each.sources)
"""The tables that the page needs."""


def readme(runs: Sequence[Run], claims: Sequence[Claim], tables: Mapping[str, Table], figures: Collection[str]) -> str:
    """The page. ``tables``: those of `SOURCES` that have records. ``figures``: the names of what could be drawn."""
    sizes = {run.facts["model"]: run.record["model"]["num_parameters"] / 1e6 for run in runs}
    models = ", ".join(
        f"{name} ({value(size, 1 if size < 10 else 0)} million parameters)"
        for name, size in sorted(sizes.items(), key=lambda item: item[1])
    )
    found = [
        across(sources, each.quantity, each.title, each.note)
        for each in EXTRACTS
        if (sources := [tables[name] for name in each.sources if name in tables])
    ]
    return render(
        "readme.md",
        num_records=f"{len(runs):,}",
        models=models,
        claims=claims,
        tally=tally(claims),
        rule=RULE,
        tables=[{"title": table.title, "notes": table.notes, "body": pipe_table(table)} for table in found],
        figures=[spec for spec in SHOWN if spec.name in figures],
    )
