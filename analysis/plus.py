"""Tables and figures of modegpt_plus beside the paper's method.

Excess log-perplexity is the mean negative log-likelihood of the compressed model minus that of the dense one, in nats a
token.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from analysis.cells import Column
from analysis.expected import experiment
from analysis.figures import FigureSpec
from analysis.tables import RATE, TableSpec
from modegpt.cli.schema import INGREDIENTS

EXCESS = Column("Excess", "nats_lost", digits=4, floor=1e-4)
ENTROPIC = {"method": "modegpt", "allocation": "entropic"}
UNIFORM = {"method": "modegpt", "allocation": "uniform"}
PLUS = {"method": "modegpt_plus"}
CONTENDERS = {"modegpt": ENTROPIC, "modegpt_uniform": UNIFORM, "modegpt_plus": PLUS}
BOTH = {"method": frozenset({"modegpt", "modegpt_plus"})}
AT_30 = BOTH | {RATE: 0.3}
OWN = ("methods", "methods_seeds")
"""Where the runs of the paper's method and of modegpt_plus are, on the model's own text and all windows."""
EXCESS_NOTE = "Excess log-perplexity: mean negative log-likelihood over the dense model's, nats a token."
RATES = {"compression.sparsity": "Rate"}


def contenders(metric: Column, names: Mapping[str, Mapping[str, Any]]) -> tuple[Column, ...]:
    """``metric`` once for each."""
    return tuple(replace(metric, label=name, where=where) for name, where in names.items())


def beside(
    metric: Column,
    where: Mapping[str, Any] = PLUS,
    *,
    against: Mapping[str, Any],
    compared: str,
    label: str,
    **look: Any,
) -> Column:
    """``metric`` of ``where`` compared with that of ``against``, seed by seed."""
    return replace(metric, label=label, where=where, against=against, compared=compared, **look)


def less_than(name: str, against: Mapping[str, Any]) -> Column:
    """The share of the excess of ``against`` that modegpt_plus does not have."""
    return beside(EXCESS, against=against, compared="reduction", label=f"Less than {name} (%)", scale=100, digits=1)


def accuracies(metric: Column, names: Mapping[str, Mapping[str, Any]]) -> tuple[Column, ...]:
    """``metric`` once for each, and its standard error; what modegpt_plus has over the paper's method, and its own."""
    error = replace(metric, label="Standard error of plus", metric=f"{metric.metric}_stderr", where=PLUS)
    over = beside(metric, against=ENTROPIC, compared="difference", label="Plus over entropic (points)")
    return (
        *contenders(metric, names),
        error,
        over,
        replace(over, compared="difference_stderr", label="Standard error of that"),
    )


FAITHFUL_AND_PLUS = (*contenders(EXCESS, {"MoDeGPT": ENTROPIC, "MoDeGPT plus": PLUS}), less_than("MoDeGPT", ENTROPIC))

NAMED = {"MoDeGPT, uniform": UNIFORM, "MoDeGPT (entropic)": ENTROPIC, "MoDeGPT plus": PLUS}
AGAINST_BOTH = (
    *contenders(EXCESS, NAMED),
    less_than("uniform", UNIFORM),
    less_than("entropic", ENTROPIC),
)


def listed(*prefixes: str) -> frozenset[str]:
    """The combinations of the ablation whose names begin so."""
    names = {each[INGREDIENTS] for each in experiment("plus_ablation").settings}
    return frozenset(name for name in names if name.startswith(prefixes))


def ablated(reference: str, compared: str, label: str) -> tuple[Column, ...]:
    """At each rate of the ablation the excess, and its change from that of ``reference``."""
    rates = dict.fromkeys(each[RATE] for each in experiment("plus_ablation").settings)
    return tuple(
        column
        for rate in rates
        for column in (
            replace(EXCESS, label=f"{100 * rate:g} %", where={RATE: rate}),
            beside(
                EXCESS,
                {RATE: rate},
                against={INGREDIENTS: reference},
                compared=compared,
                label=f"{100 * rate:g} %: {label} (%)",
                scale=100,
                digits=1,
            ),
        )
    )


def ablation(name: str, title: str, columns: tuple[Column, ...], members: Iterable[str], note: str) -> TableSpec:
    """A table of the ablation with these combinations as rows."""
    return TableSpec(
        name,
        title,
        ("plus_ablation",),
        {INGREDIENTS: "Ingredients"},
        columns,
        where={INGREDIENTS: frozenset(members)},
        note=f"{EXCESS_NOTE} {note}",
    )


ZERO_SHOT = Column("Zero-shot mean (%)", "zeroshot_mean", scale=100, digits=1)
ITEMS = (
    "Standard errors: over the items of the tests, of one run; that of the difference is paired, because both models "
    "answer the same items."
)
NEXT_SENTENCE = Column("Next sentence (%)", "zeroshot_next_sentence", scale=100, digits=1)

TABLES = (
    TableSpec(
        "plus_excess",
        "MoDeGPT plus: excess log-perplexity",
        (*OWN, "plus_uniform"),
        RATES,
        AGAINST_BOTH,
        where=BOTH,
        note=f"{EXCESS_NOTE} Less than: share of the paper's excess that modegpt_plus does not have, seed by seed.",
    ),
    TableSpec(
        "plus_zeroshot",
        "MoDeGPT plus: zero-shot mean (%)",
        (*OWN, "plus_uniform"),
        RATES,
        accuracies(ZERO_SHOT, NAMED),
        where=BOTH,
        per_perplexity=False,
        note=ITEMS,
    ),
    TableSpec(
        "plus_paper_rates",
        "MoDeGPT plus: zero-shot mean at the rates of the paper's tables (%)",
        ("zeroshot", "zeroshot_seeds"),
        RATES,
        accuracies(ZERO_SHOT, {"MoDeGPT (entropic)": ENTROPIC, "MoDeGPT plus": PLUS}),
        where=BOTH,
        per_perplexity=False,
        note=ITEMS,
    ),
    TableSpec(
        "plus_next_sentence",
        "MoDeGPT plus: which of four sentences comes next (%)",
        ("plus_zeroshot",),
        RATES,
        accuracies(NEXT_SENTENCE, {"MoDeGPT (entropic)": ENTROPIC, "MoDeGPT plus": PLUS}),
        where=BOTH,
        per_perplexity=False,
        note=f"Accuracy by acc_norm on the test text; guessing gives 25. {ITEMS}",
    ),
    TableSpec(
        "plus_real_models",
        "MoDeGPT plus: excess log-perplexity on a released model",
        ("real_models", "real_models_uniform"),
        RATES,
        AGAINST_BOTH,
        where=BOTH,
        note=f"{EXCESS_NOTE} 64 calibration windows of 512 tokens. The divergences that plus measures, its query-key "
        "windows and its range of ridges were chosen on calibration text of SmolLM2-135M, none of it scored here.",
    ),
    TableSpec(
        "plus_cost",
        "MoDeGPT plus: cost of compression at 30 %",
        ("plus_cost",),
        {"method": "Method"},
        tuple(
            column
            for metric in (
                Column("Time (s)", "compression_seconds", digits=1),
                Column("Counted TFLOPs", "flops", scale=1e-12, digits=3),
                Column("Forward passes", "forward_passes", digits=1),
                Column("Peak memory (GiB)", "peak_memory_bytes", scale=2**-30),
                Column("Peak GPU memory (GiB)", "peak_gpu_memory_bytes", scale=2**-30),
            )
            for column in (
                metric,
                replace(
                    metric,
                    label=f"{metric.label.partition(' (')[0]}, x MoDeGPT",
                    compared="ratio",
                    against={"method": "modegpt"},
                    scale=1,
                    digits=2,
                ),
            )
        ),
        per_perplexity=False,
        note="Nothing cached, nothing scored; loading not counted. x MoDeGPT: times the paper's method, seed by seed. "
        "Host memory is the whole process's.",
    ),
    ablation(
        "plus_alone",
        "MoDeGPT plus: each ingredient alone, on top of the paper's method",
        ablated("paper", "reduction", "less"),
        listed("paper", "only_", "all"),
        "Less: share of the first row's excess that goes; negative: worse.",
    ),
    ablation(
        "plus_all_but_one",
        "MoDeGPT plus: all ingredients but one",
        ablated("all", "increase", "more"),
        listed("all", "with"),
        "More: over the first row, all ingredients: what the missing one is worth; negative: better without.",
    ),
    TableSpec(
        "plus_samples",
        "MoDeGPT plus: few calibration windows, 30 % removed",
        (*OWN, "plus_samples"),
        {"calibration.num_samples": "Windows"},
        FAITHFUL_AND_PLUS,
        where=AT_30,
        note=EXCESS_NOTE,
    ),
    TableSpec(
        "plus_domain",
        "MoDeGPT plus: calibration text of another domain, 30 % removed",
        (*OWN, "plus_domain"),
        {"calibration.text": "Calibration text"},
        FAITHFUL_AND_PLUS,
        where=AT_30,
        per_text=False,
        note=EXCESS_NOTE,
    ),
)

LOSS: dict[str, Any] = {"y_label": "Excess log-perplexity (nats a token)"}
PAIR: dict[str, Any] = {
    "series": {name: CONTENDERS[name] for name in ("modegpt", "modegpt_plus")},
    "y": replace(EXCESS, where={RATE: 0.3}),
    "where": AT_30,
    **LOSS,
}
FIGURES = (
    FigureSpec(
        "plus_excess",
        "Excess log-perplexity",
        (*OWN, "plus_uniform"),
        CONTENDERS,
        EXCESS,
        point=RATE,
        x="achieved_sparsity",
        x_scale=100,
        x_label="Block-linear weights removed (%)",
        where=BOTH,
        log_y=True,
        **LOSS,
    ),
    FigureSpec(
        "plus_real_models",
        "A released model",
        ("real_models", "real_models_uniform"),
        CONTENDERS,
        Column("Perplexity", "perplexity"),
        point=RATE,
        x="achieved_sparsity",
        x_scale=100,
        x_label="Block-linear weights removed (%)",
        y_label="Perplexity",
        where=BOTH,
    ),
    FigureSpec(
        "plus_samples",
        "Few calibration windows, 30 % removed",
        (*OWN, "plus_samples"),
        point="calibration.num_samples",
        x_label="Calibration windows",
        log_x=True,
        **PAIR,
    ),
    FigureSpec(
        "plus_domain",
        "Calibration text of another domain, 30 % removed",
        (*OWN, "plus_domain"),
        point="calibration.text",
        x_label="Calibration text",
        per_text=False,
        **PAIR,
    ),
)
