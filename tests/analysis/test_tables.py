"""Numbers, spreads, marks and refusals of the tables, on invented records whose numbers are known."""

import csv
import io
from pathlib import Path

import pytest

from analysis.cells import Column, groups
from analysis.expected import screen
from analysis.formats import latex, markdown, tidy_csv
from analysis.runs import load_runs
from analysis.specs import TABLES
from analysis.tables import BEST, SPREAD, Table, across, build

SPECS = {spec.name: spec for spec in TABLES}


def table(root: Path, name: str) -> Table:
    [built] = build(SPECS[name], screen(load_runs(root))[0])
    return built


def row(built: Table, label: str, block: int = 0):
    [found] = [row for row in built.blocks[block][1] if row.labels[-1] == label or row.labels[0] == label]
    return found


def test_means_spreads_and_marks(store, tmp_path: Path) -> None:
    store.write(tmp_path, "methods")
    store.write(tmp_path, "methods_seeds")
    built = table(tmp_path, "methods_perplexity")
    assert [heading for heading, _ in built.blocks] == [
        f"tiny-llama, perplexity on tiny corpus, {window}-token windows" for window in (256, 128)
    ]
    random, magnitude, modegpt = (row(built, name) for name in ("Random", "Magnitude", "MoDeGPT"))
    # 4 + 10 * sparsity * 1 + 0.1 * seed over seeds 0, 1, 2
    assert random.cells[2].values == pytest.approx((7.0, 7.1, 7.2))
    assert (random.cells[2].mean, random.cells[2].spread) == (pytest.approx(7.1), pytest.approx(0.1))
    assert magnitude.cells[2].spread is None and magnitude.cells[2].mean == pytest.approx(10.0)
    assert (random.marks[2], magnitude.marks[2], modegpt.marks[2]) == ("best", "second", "")
    assert [cell.mean for cell in row(built, "Dense").cells] == [4.0] * 5
    assert built.missing == ()
    assert len(random.cells[2].records) == 3 and all((tmp_path / path).is_file() for path in random.cells[2].records)


def test_what_a_seed_is_missing_from_is_refused_and_named(store, tmp_path: Path) -> None:
    store.write(tmp_path, "variants_mlp", skip=[4])  # nystrom, 0.2, seed 1
    built = table(tmp_path, "variants_mlp_perplexity")
    refused = row(built, "Nyström").cells
    assert [cell.refused for cell in refused] == [None, "incomplete", None, None, None]
    assert refused[1].values == ()
    [missing] = built.missing
    assert "1 of 105 runs of `variants_mlp`" in missing
    assert "`modegpt --multirun +experiments=variants_mlp model=tiny-llama`" in missing
    assert "incomplete" in markdown(built)


def test_runs_of_another_experiment_do_not_count_as_begun(store, tmp_path: Path) -> None:
    """The paper's own choice is a run of every ``variants_*`` file, and query-key's common variants of both lists."""
    store.write(tmp_path, "variants_query_key")
    built = table(tmp_path, "variants_query_key_perplexity")
    assert built.missing == ()
    labels = ["Dense", "CR", "CR, pair score", "Greedy elimination", "Magnitude", "Random"]
    assert [each.labels[0] for each in built.blocks[0][1]] == labels
    assert build(SPECS["variants_value_output_perplexity"], load_runs(tmp_path))[0].missing == ()


def test_limited_and_mixed_versions_are_left_out(store, tmp_path: Path) -> None:
    store.write(tmp_path, "seeds")
    each = store.experiment("seeds")
    store.write_one(tmp_path, each, {"seed": 3}, limit=100)
    store.write_one(tmp_path, each, {"seed": 4}, weights="d")
    kept, refused = screen(load_runs(tmp_path))
    assert len(kept) == 8
    assert sorted(each.reason.partition(":")[0] for each in refused) == ["limited", "mixed version"]


def test_a_part_of_a_text_is_scored_where_the_experiment_says_so(store, tmp_path: Path) -> None:
    store.write(tmp_path, "head_norm", limit=8192)
    store.write_one(tmp_path, store.experiment("head_norm"), {"seed": 3}, limit=4096)
    kept, refused = screen(load_runs(tmp_path))
    assert len(kept) == 8 and [each.reason.partition(":")[0] for each in refused] == ["limited"]
    headings = [heading for heading, _ in build(SPECS["head_norm"], kept)[0].blocks]
    assert headings and all("windows of its first 8,192 tokens" in heading for heading in headings)


def test_a_part_of_a_text_is_scored_where_the_added_protocol_says_so(store, tmp_path: Path) -> None:
    each = store.experiment("engines_plus")
    for seed, (limit, protocol) in enumerate(((16384, "real_models"), (16384, "unheard_of"), (8192, "real_models"))):
        command = f"modegpt +experiments=engines_plus +experiments/protocol={protocol} model=tiny-llama threads=1"
        store.write_one(tmp_path, each, each.settings[0] | {"seed": seed}, limit=limit, command=command)
    kept, refused = screen(load_runs(tmp_path))
    [run], [first, second] = kept, refused
    assert run.setting("evaluation.perplexity.limit") == 16384 and first.reason == second.reason
    assert "experiments/protocol=real_models model=tiny-llama" in each.command(run)


def test_mixed_settings_have_no_mean(store, tmp_path: Path) -> None:
    store.write(tmp_path, "seeds")
    place = store.write_one(
        tmp_path, store.experiment("seeds"), {"seed": 1, "method": "modegpt", "allocation": "uniform"}
    )
    assert place.is_file()
    [built] = build(SPECS["seeds"], load_runs(tmp_path))[:1]
    assert row(built, "MoDeGPT").cells[0].refused == "mixed settings"


def test_texts_and_windows_are_kept_apart(store, tmp_path: Path) -> None:
    store.write(tmp_path, "methods", text="tiny")
    store.write(tmp_path, "methods", text="alpaca")
    found = groups(load_runs(tmp_path), ("methods",), per_perplexity=True)
    assert [(group.text, group.perplexity) for group in found] == [
        (text, f"ppl_tiny_{window}") for text in ("alpaca", "tiny") for window in (256, 128)
    ]
    cell = found[0].cell(Column("", "perplexity"), {"method": "random", "compression.sparsity": 0.3})
    assert len(cell.values) == 1


def test_tasks_means_and_retention(store, tmp_path: Path) -> None:
    store.write(tmp_path, "zeroshot")
    built = build(SPECS["zeroshot"], load_runs(tmp_path))[0]
    assert [column.label for column in built.columns][:2] == ["easy_facts (acc_norm, %)", "hard_facts (acc_norm, %)"]
    first = built.blocks[0][1][1]
    assert first.labels == ("25 %", "ShortGPT")
    weight = 1 + store.method_position("shortgpt")
    assert first.cells[0].mean == pytest.approx(100 * (0.96 - 0.05 * 0.25 * weight))
    assert first.cells[-1].mean == pytest.approx(100 * (0.86 - 0.05 * 0.25 * weight) / 0.86)


def test_what_holds_for_one_of_several_tables_is_said_of_what_they_make(store, tmp_path: Path) -> None:
    store.write(tmp_path, "real_models")
    store.write(tmp_path, "methods")
    store.write(tmp_path, "methods_seeds")
    released, own = table(tmp_path, "real_models_perplexity"), table(tmp_path, "methods_perplexity")
    assert SPREAD not in released.notes and SPREAD in own.notes
    assert across([released, own], "30 %", "title", "note").notes[-2:] == (SPREAD, BEST)


def test_one_module_at_a_time(store, tmp_path: Path) -> None:
    store.write(tmp_path, "module_wise")
    built = table(tmp_path, "module_wise_perplexity")
    assert [each.labels[0] for each in built.blocks[0][1]] == ["Dense", "MLP", "Query-key", "Value-output"]
    assert all(cell.values for each in built.blocks[0][1] for cell in each.cells)


def test_formats_hold_the_same_numbers(store, tmp_path: Path) -> None:
    store.write(tmp_path, "methods")
    store.write(tmp_path, "methods_seeds")
    built = table(tmp_path, "methods_perplexity")
    assert "| Random | **5.10 ± 0.10 (3)** |" in markdown(built)
    assert r"Random & \textbf{5.10 $\pm$ 0.10 (3)}" in latex(built)
    assert latex(built).count(r"\midrule") == 2 and r"10 \%" in latex(built)
    rows = list(csv.DictReader(io.StringIO(tidy_csv(built))))
    [line] = [
        line
        for line in rows
        if line["Method"] == "Random" and line["quantity"] == "10 %" and "256-token" in line["block"]
    ]
    assert (float(line["mean"]), float(line["sample_standard_deviation"]), line["n"]) == (
        pytest.approx(5.1),
        pytest.approx(0.1),
        "3",
    )
    assert len(line["records"].split()) == 3


def test_recovery_stands_beside_what_it_started_from(store, tmp_path: Path) -> None:
    store.write(tmp_path, "recovery")
    built = table(tmp_path, "recovery")
    assert [column.label for column in built.columns] == [
        "Perplexity before",
        "after",
        "Zero-shot mean before (%)",
        "after (%)",
    ]
    dense, *rows = built.blocks[0][1]
    assert dense.cells[0].values == () and len(rows) == 12
    assert {row.labels[1:] for row in rows} == {
        ("MoDeGPT", "MLP"),
        ("MoDeGPT", "all"),
        ("SliceGPT", "MLP"),
        ("SliceGPT", "all"),
    }
    for each in rows:
        before, after = each.cells[0].mean, each.cells[1].mean
        assert before == pytest.approx(2.718281828 * after) and each.cells[2].mean == pytest.approx(25.0)


def test_speeds_stand_beside_the_dense_model_of_their_own_run(store, tmp_path: Path) -> None:
    """Twice as fast at 100 %: a speed-up of one plus the rate, which the fixture's methods share."""
    store.write(tmp_path, "throughput")
    tokens, latency, speedup = (table(tmp_path, f"throughput_{name}") for name in ("tokens", "latency", "speedup"))
    assert [column.label for column in tokens.columns] == [
        "decode 8 x 64",
        "dense",
        "decode 1 x 64",
        "dense",
        "prefill 1 x 64",
        "dense",
    ]
    half = next(row.cells for row in tokens.blocks[0][1] if row.labels == ("50 %", "MoDeGPT"))
    assert [cell.mean for cell in half] == pytest.approx([3000, 2000, 750, 500, 1500, 1000])
    half = next(row.cells for row in latency.blocks[0][1] if row.labels == ("50 %", "MoDeGPT"))
    assert [cell.mean for cell in half] == pytest.approx([8 / 3, 4, 4 / 3, 2, 128 / 3, 64])
    half = next(row.cells for row in speedup.blocks[0][1] if row.labels == ("50 %", "SliceGPT"))
    assert [cell.mean for cell in half] == pytest.approx([1.5, 2, 1.5, 2, 1.5, 2, 384, 49.9])
    assert all(
        table.missing == () and not any(mark for row in table.blocks[0][1] for mark in row.marks)
        for table in (tokens, latency)
    )
