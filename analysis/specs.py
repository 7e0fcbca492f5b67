"""Every table and figure of the report, declared. What is not here is not in the report."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from analysis import plus
from analysis.cells import Column, Group
from analysis.figures import FigureSpec
from analysis.published import Published
from analysis.runs import Run
from analysis.tables import TableSpec
from modegpt.records.frame import workload_name

RATES = (0.1, 0.2, 0.3, 0.4, 0.5)
MIDDLE_RATES = (0.2, 0.3, 0.4)
PERPLEXITY = Column("Perplexity", "perplexity", "lower")
ZERO_SHOT = Column("Zero-shot mean (%)", "zeroshot_mean", "higher", scale=100, digits=1)
KEPT = Column("Zero-shot mean kept (%)", "retention_mean", "higher", scale=100, digits=1)
REMOVED = Column("Removed, block-linear (%)", "achieved_sparsity", scale=100, digits=1)
WHOLE = Column("Removed, whole model (%)", "whole_model_sparsity", scale=100, digits=1)
METHODS = {"method": "Method"}
METHODS_AND_RATES = {"compression.sparsity": "Rate", "method": "Method"}
MODULES = {
    "mlp": ("variants_mlp", "real_models_mlp"),
    "query_key": ("variants_query_key", "variants_query_key_opt", "real_models_query_key"),
    "value_output": ("variants_value_output", "real_models_value_output"),
}
NAMES = {"mlp": "MLP", "query_key": "query-key", "value_output": "value-output"}
TAKING_TURNS = "Batch x tokens; medians over rounds in which dense and compressed take turns in one process."
DEFAULTS = {"mlp": "nystrom", "query_key": "cr", "value_output": "svd"}


def at_rates(column: Column, rates: tuple[float, ...] = RATES, key: str = "compression.sparsity") -> tuple[Column, ...]:
    """One column a rate."""
    return tuple(replace(column, label=f"{100 * rate:g} %", where={key: rate}) for rate in rates)


def tasks(group: Group) -> tuple[Column, ...]:
    """Every zero-shot task of the group by its metric, their mean, and the share of it that is kept."""
    scored = group.runs[0].record["metrics"]["dense"]["zeroshot"]
    columns = [
        Column(f"{task} ({score['metric']}, %)", f"zeroshot_{task}", "higher", scale=100, digits=1)
        for task, score in scored.items()
        if task != "mean"
    ]
    return (*columns, replace(ZERO_SHOT, label="Mean (%)"), replace(KEPT, label="Mean kept (%)"))


def workloads(group: Group) -> dict[str, str]:
    """What was timed, by the name of its columns."""
    measured = group.runs[0].record["metrics"]["throughput"]["measurements"]
    return {workload_name(each): f"{each['phase']} {each['batch_size']} x {each['length']}" for each in measured}


def beside_dense(group: Group, quantity: str, digits: int) -> tuple[Column, ...]:
    """``quantity`` of every workload, and the dense model's in the same process."""
    columns = [
        (Column(text, f"{name}_{quantity}", digits=digits), Column("dense", f"dense_{name}_{quantity}", digits=digits))
        for name, text in workloads(group).items()
    ]
    return tuple(column for pair in columns for column in pair)


def speedups(group: Group) -> tuple[Column, ...]:
    """Speed-up of every workload, what the sizes would allow, and the cache."""
    columns = [
        (Column(text, f"{name}_speedup", "higher"), Column("of", f"{name}_ideal_speedup"))
        for name, text in workloads(group).items()
    ]
    return (
        *(column for pair in columns for column in pair),
        Column("Cache (bytes/token)", "cache_bytes_per_token", "lower", digits=0),
        replace(REMOVED, label="Removed (%)"),
    )


def others(module: str) -> dict[str, str]:
    """The other two modules as in the paper."""
    return {f"decomposition/{other}": choice for other, choice in DEFAULTS.items() if other != module}


REMARKS = {
    "mlp": " Columns: the channels of the Nyström variant without the refit.",
    "query_key": "",
    "value_output": " Columns: value dims by backward elimination, output refitted.",
}

VARIANT_TABLES = tuple(
    TableSpec(
        name=f"variants_{module}_{name}",
        title=f"Decomposition of the {NAMES[module]} module: {title}, all else equal",
        experiments=files,
        rows={f"decomposition/{module}": "Decomposition"},
        columns=at_rates(column),
        where=others(module),
        dense=dense,
        per_perplexity=dense,
        note=f"Columns: share of the block-linear weights removed, uniformly over layers. {note}{REMARKS[module]}",
    )
    for module, files in MODULES.items()
    for name, title, column, dense, note in (
        ("perplexity", "perplexity", PERPLEXITY, True, "The other two modules use the paper's decompositions."),
        (
            "error",
            "relative module error",
            Column("Error", f"relative_error_{module}", "lower", digits=4),
            False,
            "Squared error over the energy of the target that the decomposition itself minimises, mean over layers; "
            "targets differ between decompositions, so perplexity is the common measure.",
        ),
    )
)

MAIN_TABLES = (
    TableSpec(
        "methods_perplexity",
        "Perplexity over methods and rates",
        ("methods", "methods_seeds"),
        METHODS,
        at_rates(PERPLEXITY),
        note="Columns: the share asked for; what was removed is in its own table.",
    ),
    TableSpec(
        "methods_zeroshot",
        "Zero-shot mean accuracy (%) over methods and rates",
        ("methods", "methods_seeds"),
        METHODS,
        at_rates(ZERO_SHOT),
        per_perplexity=False,
    ),
    TableSpec(
        "methods_retention",
        "Share of the dense zero-shot mean that is kept (%)",
        ("methods", "methods_seeds"),
        METHODS,
        at_rates(KEPT),
        per_perplexity=False,
    ),
    TableSpec(
        "methods_removed",
        "Share of the block-linear weights removed (%) against the share asked for",
        ("methods", "methods_seeds"),
        METHODS,
        at_rates(REMOVED),
        per_perplexity=False,
    ),
    TableSpec(
        "methods_tasks",
        "Zero-shot accuracy task by task over methods and rates",
        ("methods", "methods_seeds"),
        METHODS_AND_RATES,
        tasks,
        per_perplexity=False,
        one_per_group=True,
    ),
    TableSpec(
        "zeroshot",
        "Zero-shot accuracy at the rates of the paper's tables",
        ("zeroshot", "zeroshot_seeds"),
        METHODS_AND_RATES,
        tasks,
        per_perplexity=False,
        one_per_group=True,
    ),
    TableSpec(
        "real_models_perplexity",
        "A released model: perplexity over methods and rates",
        ("real_models",),
        METHODS,
        at_rates(PERPLEXITY, RATES),
        note="Columns: the share asked for. MoDeGPT has its entropic allocation.",
    ),
    TableSpec(
        "real_models_allocation",
        "A released model: sparsity over layers, perplexity",
        ("real_models", "real_models_uniform"),
        {"allocation": "Allocation"},
        at_rates(PERPLEXITY, RATES),
        where={"method": "modegpt"},
    ),
    TableSpec(
        "real_models_zeroshot",
        "A released model: zero-shot accuracy over methods and rates",
        ("real_models_zeroshot",),
        METHODS_AND_RATES,
        tasks,
        per_perplexity=False,
        one_per_group=True,
    ),
    TableSpec(
        "real_models_retention",
        "A released model: share of the dense zero-shot mean that is kept (%)",
        ("real_models_zeroshot",),
        METHODS,
        at_rates(KEPT, MIDDLE_RATES),
        per_perplexity=False,
        note="Columns: the share asked for. MoDeGPT has its entropic allocation.",
    ),
    TableSpec(
        "mixtures_perplexity",
        "A mixture of experts: perplexity over methods and rates",
        ("mixtures",),
        METHODS,
        at_rates(PERPLEXITY, MIDDLE_RATES),
        note="Columns: the share asked for. MoDeGPT has its entropic allocation.",
    ),
    TableSpec(
        "mixtures_allocation",
        "A mixture of experts: sparsity over layers, perplexity",
        ("mixtures", "mixtures_uniform"),
        {"allocation": "Allocation"},
        at_rates(PERPLEXITY, MIDDLE_RATES),
        where={"method": "modegpt"},
    ),
    TableSpec(
        "opt_family", "OPT family: perplexity over methods and rates", ("opt_family",), METHODS, at_rates(PERPLEXITY)
    ),
    TableSpec(
        "llama2_70b",
        "The 70B experiment: 30 % removed",
        ("llama2_70b",),
        METHODS,
        (PERPLEXITY, ZERO_SHOT, KEPT, REMOVED, WHOLE),
    ),
)

ABLATION_TABLES = (
    *VARIANT_TABLES,
    TableSpec(
        "module_wise_perplexity",
        "One module type at a time: perplexity",
        ("module_wise", "real_models_modules"),
        {"module": "Module"},
        at_rates(PERPLEXITY, key="module_rate"),
        note="Columns: share of that module's own weights removed.",
    ),
    TableSpec(
        "module_wise_per_parameter",
        "One module type at a time: nats lost per removed per cent of the block-linear weights",
        ("module_wise", "real_models_modules"),
        {"module": "Module"},
        at_rates(Column("Loss", "log_increase_per_percent", "lower", digits=4), key="module_rate"),
        note="Increase of the mean negative log-likelihood (nats a token) divided by the per cent of all block-linear "
        "weights that went.",
    ),
    TableSpec(
        "head_norm",
        "Queries and keys under a norm of their heads: which pairs stay, and how their norm is estimated",
        ("head_norm", "head_norm_selection"),
        {"decomposition/query_key": "Pairs", "decomposition.query_key.head_norm": "Mean square of the head"},
        tuple(
            column
            for column in at_rates(
                replace(plus.EXCESS, better="lower"), (0.25, 0.5), "compression.module_sparsity.query_key"
            )
            for column in (
                column,
                replace(
                    column,
                    label=f"{column.label}, of the first row's (%)",
                    better=None,
                    scale=100,
                    digits=1,
                    compared="ratio",
                    against={"decomposition/query_key": "cr_pairs", "decomposition.query_key.head_norm": "kept"},
                ),
            )
        ),
        note=f"{plus.EXCESS_NOTE} Columns: share of the pairs of queries and keys removed; all else is dense, and "
        "rows of one choice keep the same pairs.",
    ),
    TableSpec(
        "allocation_perplexity",
        "Sparsity over layers: perplexity",
        ("allocation",),
        {"allocation": "Allocation"},
        at_rates(PERPLEXITY),
    ),
    TableSpec(
        "allocation_zeroshot",
        "Sparsity over layers: zero-shot mean (%)",
        ("allocation",),
        {"allocation": "Allocation"},
        at_rates(ZERO_SHOT),
        per_perplexity=False,
    ),
    TableSpec(
        "allocation_epsilon",
        "Entropic allocation: perplexity over epsilon",
        ("allocation_epsilon",),
        {"allocation.epsilon": "Epsilon"},
        at_rates(PERPLEXITY, (0.2, 0.3, 0.4)),
    ),
    TableSpec(
        "calibration_size",
        "Calibration windows: perplexity at 30 %",
        ("calibration_size", "real_models_size"),
        {"calibration.num_samples": "Windows"},
        (PERPLEXITY,),
    ),
    TableSpec(
        "calibration_choice_perplexity",
        "Calibration text: perplexity",
        ("calibration_choice", "real_models_text"),
        {"calibration.text": "Calibration text"},
        at_rates(PERPLEXITY, (0.2, 0.3, 0.4)),
        per_text=False,
    ),
    TableSpec(
        "calibration_choice_zeroshot",
        "Calibration text: zero-shot mean (%)",
        ("calibration_choice", "real_models_text"),
        {"calibration.text": "Calibration text"},
        at_rates(ZERO_SHOT, (0.2, 0.3, 0.4)),
        per_text=False,
        per_perplexity=False,
    ),
    TableSpec(
        "ridge",
        "Ridge of the Nyström decomposition: perplexity",
        ("ridge",),
        {"decomposition.mlp.ridge": "Relative ridge"},
        at_rates(PERPLEXITY, (0.3, 0.5)),
    ),
    *(
        TableSpec(
            name,
            f"Sizes that engines take: {title}",
            ("engines", "engines_shared"),
            {"compression.engine": "Engine", "decomposition/query_key": "Query-key"},
            at_rates(column, (0.2, 0.3, 0.4)),
            per_perplexity=column is not REMOVED,
            dense=column is not REMOVED,
            note="Uniform allocation. Heads are cut where every size is free (any), or where all get one size and one "
            "set of frequencies (stock, CR, one set of frequencies); elsewhere attention stays whole." + note,
        )
        for name, title, column, note in (
            (
                "engines",
                "perplexity",
                replace(PERPLEXITY, within=0.01),
                " No number where the widths that an engine takes miss the rate by over one per cent of the weights.",
            ),
            ("engines_removed", "share of the block-linear weights removed (%)", REMOVED, ""),
        )
    ),
    *(
        TableSpec(
            name,
            f"Sizes that engines take, {title}: perplexity",
            (name,),
            {"compression.engine": "Engine"},
            at_rates(replace(PERPLEXITY, within=0.01), MIDDLE_RATES),
            note="One sparsity for all layers. Attention stays whole but where every size is free (any).",
        )
        for name, title in (("engines_real", "a released model"), ("engines_plus", "plus"))
    ),
    TableSpec(
        "recovery",
        "LoRA recovery, before and after",
        ("recovery", "real_models_recovery"),
        {"compression.sparsity": "Rate", "method": "Method", "recovery.targets": "Adapted"},
        (
            Column("Perplexity before", "perplexity_before"),
            replace(PERPLEXITY, label="after"),
            Column("Zero-shot mean before (%)", "before_zeroshot_mean", scale=100, digits=1),
            replace(ZERO_SHOT, label="after (%)"),
        ),
        note="Adapters are trained on the calibration text after compression and merged into the weights.",
    ),
    TableSpec("seeds", "Spread over calibration seeds at 30 %", ("seeds",), METHODS, (PERPLEXITY, ZERO_SHOT, KEPT)),
)

COST_TABLES = (
    TableSpec(
        "compression_cost",
        "Cost of compression at 30 %",
        ("compression_cost",),
        METHODS,
        (
            Column("Time (s)", "seconds", "lower", digits=1),
            Column("Peak memory (GiB)", "peak_memory_bytes", "lower", scale=2**-30, digits=2),
            Column("Peak GPU memory (GiB)", "peak_gpu_memory_bytes", "lower", scale=2**-30, digits=2),
            Column("Counted TFLOPs", "flops", "lower", scale=1e-12, digits=3),
            Column("Forward passes", "forward_passes", digits=0),
            Column("Backward passes", "backward_passes", digits=0),
        ),
        per_perplexity=False,
        note="Nothing cached, nothing scored. FLOPs are those that the run counts; host memory is the whole process's.",
    ),
    *(
        TableSpec(
            f"throughput_{name}",
            f"{title} against rate",
            ("throughput",),
            METHODS_AND_RATES,
            columns,
            per_perplexity=False,
            one_per_group=True,
            dense=False,
            note=note,
        )
        for name, title, columns, note in (
            (
                "tokens",
                "Throughput (tokens/s)",
                partial(beside_dense, quantity="tokens_per_second", digits=0),
                TAKING_TURNS,
            ),
            (
                "latency",
                "Latency (ms)",
                partial(beside_dense, quantity="milliseconds", digits=2),
                f"Of a prefill, or of one more token of every sequence. {TAKING_TURNS}",
            ),
            (
                "speedup",
                "Speed-up over the dense model",
                speedups,
                "Batch x tokens; median over rounds of the ratio in the same round. "
                "Of: what the sizes allow on that machine, by the FLOPs or bytes that bind.",
            ),
        )
    ),
)

ACHIEVED: dict[str, Any] = {
    "point": "compression.sparsity",
    "x": "achieved_sparsity",
    "x_scale": 100,
    "x_label": "Block-linear weights removed (%)",
}
MAIN_FIGURES = (
    FigureSpec(
        "methods_perplexity",
        "Perplexity over methods",
        ("methods", "methods_seeds"),
        "method",
        PERPLEXITY,
        y_label="Perplexity",
        log_y=True,
        **ACHIEVED,
    ),
    FigureSpec(
        "methods_zeroshot",
        "Zero-shot mean over methods",
        ("methods", "methods_seeds"),
        "method",
        ZERO_SHOT,
        y_label="Zero-shot mean accuracy (%)",
        per_perplexity=False,
        **ACHIEVED,
    ),
    FigureSpec(
        "opt_family", "OPT family", ("opt_family",), "method", PERPLEXITY, y_label="Perplexity", log_y=True, **ACHIEVED
    ),
)

ABLATION_FIGURES = (
    *(
        FigureSpec(
            f"variants_{module}",
            f"Decomposition of the {NAMES[module]} module",
            files,
            f"decomposition/{module}",
            PERPLEXITY,
            y_label="Perplexity",
            where=others(module),
            log_y=True,
            **ACHIEVED,
        )
        for module, files in MODULES.items()
    ),
    *(
        FigureSpec(
            f"variants_{module}_error",
            f"Decomposition of the {NAMES[module]} module: its own relative error",
            files,
            f"decomposition/{module}",
            Column("Error", f"relative_error_{module}"),
            y_label="Relative module error",
            where=others(module),
            per_perplexity=False,
            **ACHIEVED,
        )
        for module, files in MODULES.items()
    ),
    FigureSpec(
        "module_wise",
        "One module type at a time",
        ("module_wise", "real_models_modules"),
        "module",
        PERPLEXITY,
        point="module_rate",
        x_scale=100,
        x_label="Share of the module's weights removed (%)",
        y_label="Perplexity",
        log_y=True,
    ),
    FigureSpec(
        "allocation",
        "Sparsity over layers",
        ("allocation",),
        "allocation",
        PERPLEXITY,
        y_label="Perplexity",
        log_y=True,
        **ACHIEVED,
    ),
    FigureSpec(
        "allocation_epsilon",
        "Entropic allocation",
        ("allocation_epsilon",),
        "compression.sparsity",
        PERPLEXITY,
        point="allocation.epsilon",
        x_label="Epsilon",
        y_label="Perplexity",
        log_x=True,
    ),
    FigureSpec(
        "calibration_size",
        "Size of the calibration set, 30 % removed",
        ("calibration_size", "real_models_size"),
        "method",
        PERPLEXITY,
        point="calibration.num_samples",
        x_label="Calibration windows",
        y_label="Perplexity",
        log_x=True,
    ),
    FigureSpec(
        "ridge",
        "Ridge of the Nyström decomposition",
        ("ridge",),
        "compression.sparsity",
        PERPLEXITY,
        point="decomposition.mlp.ridge",
        x_label="Ridge relative to the mean diagonal",
        y_label="Perplexity",
        log_x=True,
    ),
    FigureSpec(
        "layer_sparsity",
        "What the entropic allocation removes",
        ("layer_sparsity",),
        "compression.sparsity",
        Column("Removed", "layers", scale=100),
        point="layer",
        x_label="Layer",
        y_label="Block-linear weights removed (%)",
        per_perplexity=False,
    ),
)

COST_FIGURES = (
    *(
        FigureSpec(
            f"throughput_{phase}",
            f"Speed-up of {what}, the largest batch measured",
            ("throughput",),
            "method",
            Column("Speed-up", f"speedup_{phase}"),
            y_label=f"Speed-up of {what} over dense",
            per_perplexity=False,
            **ACHIEVED,
        )
        for phase, what in (("prefill", "prefill"), ("decode", "decoding"))
    ),
)


@dataclass(frozen=True)
class Part:
    """One part of the report."""

    name: str
    title: str
    tables: tuple[TableSpec, ...]
    figures: tuple[FigureSpec, ...]


PARTS = (
    Part("main", "Main tables", MAIN_TABLES, MAIN_FIGURES),
    Part("ablations", "Ablations", ABLATION_TABLES, ABLATION_FIGURES),
    Part("plus", "MoDeGPT plus", plus.TABLES, plus.FIGURES),
    Part("cost", "Cost and speed", COST_TABLES, COST_FIGURES),
)
TABLES = tuple(spec for part in PARTS for spec in part.tables)
FIGURES = tuple(spec for part in PARTS for spec in part.figures)


def is_wikitext(each: Published) -> bool:
    """Whether the figure is one of the paper's WikiText-2 perplexities of the 7B and 13B models."""
    return (
        each.paper == "MoDeGPT"
        and each.metric == "wikitext2_ppl"
        and "allocation" not in each.table
        and "70B" not in each.table
    )


COMPARED = (
    ("published_perplexity", "MoDeGPT's WikiText-2 perplexities", ("methods", "methods_seeds"), is_wikitext),
    (
        "published_zeroshot",
        "MoDeGPT's zero-shot accuracies",
        ("methods", "zeroshot"),
        lambda each: each.paper == "MoDeGPT" and "zero-shot table" in each.table,
    ),
    (
        "published_allocation",
        "MoDeGPT's allocation ablation",
        ("allocation",),
        lambda each: each.paper == "MoDeGPT" and "allocation" in each.table,
    ),
    (
        "published_70b",
        "MoDeGPT's 70B table",
        ("llama2_70b",),
        lambda each: each.paper == "MoDeGPT" and "70B" in each.table,
    ),
    (
        "published_cost",
        "MoDeGPT's cost figures",
        ("compression_cost",),
        lambda each: each.paper == "MoDeGPT" and ("Tables 6-8" in each.table or "abstract" in each.table),
    ),
    ("published_opt", "OPT, dense", ("opt_family",), lambda each: each.model.startswith("OPT-")),
)
"""Published figures to list: name, title, our experiments, and which."""


def folders(experiments: Sequence[str], runs: Sequence[Run]) -> list[Run]:
    """The runs in the folders of these experiments."""
    return [run for run in runs if run.facts["experiment"] in experiments]
