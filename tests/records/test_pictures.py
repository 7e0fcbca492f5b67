"""The pictures show the record's values under the right labels (values, not pixels)."""

from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer

from modegpt.records.pictures import layers_figure, save_pictures, scores_figure
from tests.records.sample import FULL_RANKS, TASKS, sample_record


def heights(axis: Axes) -> list[float]:
    return [bar.get_height() for container in axis.containers for bar in getattr(container, "patches", [])]


def test_what_was_not_scored_has_no_panel() -> None:
    record = sample_record()
    for metrics in (record["metrics"]["dense"], record["metrics"]["compressed"]):
        metrics["zeroshot"] = {}
    [perplexity] = scores_figure(record).axes
    assert "Perplexity" in perplexity.get_ylabel()


def test_scores() -> None:
    figure = scores_figure(sample_record())
    perplexity, accuracy = figure.axes
    assert heights(perplexity) == pytest.approx([4.0, 4.4, 5.5, 6.05])
    assert "Perplexity" in perplexity.get_ylabel() and "tokens" in perplexity.get_xlabel()
    assert [tick.get_text() for tick in perplexity.get_xticklabels()] == ["tiny\n256", "tiny\n128"]
    assert perplexity.get_yscale() == "linear" and perplexity.get_ylim()[0] == 0
    dense, compressed = ([100 * entry[column] for entry in TASKS.values()] for column in (1, 2))
    assert heights(accuracy) == pytest.approx([*dense, 86.0, *compressed, 79.0])
    assert "(%)" in accuracy.get_ylabel() and accuracy.get_ylim()[0] == 0
    assert accuracy.get_xticklabels()[-1].get_text() == "mean\nof 5"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "compressed"]
    assert "29.9 %" in figure.get_suptitle()


def test_each_bar_has_the_error_of_its_own_model() -> None:
    accuracy = scores_figure(sample_record()).axes[1]
    drawn = [container for container in accuracy.containers if isinstance(container, ErrorbarContainer)]
    reach = [[(line[1][1] - line[0][1]) / 2 for line in each.lines[2][0].get_segments()] for each in drawn]
    assert reach == [pytest.approx([2.0] * 5 + [0.9]), pytest.approx([3.0] * 5 + [1.3])]


def test_far_perplexities_share_a_logarithmic_axis() -> None:
    record = sample_record()
    record["metrics"]["compressed"]["perplexity"]["ppl_tiny_256"]["value"] = 900.0
    axis = scores_figure(record).axes[0]
    assert axis.get_yscale() == "log" and axis.get_ylim()[0] < 4.0 < 900.0 < axis.get_ylim()[1]


def test_layers() -> None:
    record = sample_record()
    layers = record["compression"]["layers"]
    sparsity, *modules = layers_figure(record).axes
    assert heights(sparsity) == pytest.approx([100 * layer["sparsity"] for layer in layers])
    assert sparsity.get_xlabel() == "Layer" and "(%)" in sparsity.get_ylabel()
    (line,) = sparsity.lines
    assert list(line.get_ydata()) == [30.0, 30.0] and line.get_label() == "target 30 %"
    assert len(modules) == 3
    for axis, (module, full) in zip(modules, FULL_RANKS.items(), strict=True):
        assert heights(axis) == [layer["ranks"][module] for layer in layers]
        assert list(axis.lines[0].get_ydata()) == [full, full] and axis.get_ylim()[0] == 0


def test_layers_of_a_method_without_ranks_show_sparsity_alone() -> None:
    record = sample_record()
    for layer in record["compression"]["layers"]:
        layer["ranks"], layer["sparsity"] = {}, float(layer["index"] == 4)
    (axis,) = layers_figure(record).axes
    assert heights(axis) == [0, 0, 0, 0, 100, 0] and axis.get_ylim()[1] >= 100


def test_files(tmp_path: Path) -> None:
    paths = save_pictures(sample_record(), tmp_path)
    assert [path.name for path in paths] == ["scores.png", "layers.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    (tmp_path / "dense").mkdir()
    assert [path.name for path in save_pictures(sample_record(dense=True), tmp_path / "dense")] == ["scores.png"]
    nothing = sample_record(dense=True)
    nothing["metrics"]["dense"] = {"perplexity": {}, "zeroshot": {}}
    (tmp_path / "nothing").mkdir()
    assert save_pictures(nothing, tmp_path / "nothing") == []


@pytest.mark.parametrize("name", ["$", r"a$\\frac{$", "n" * 300, "some/where", "a\nb", "\x1b[2J"])
def test_no_name_of_a_model_breaks_a_picture(tmp_path: Path, name: str) -> None:
    record = sample_record()
    record["model"]["name"] = name
    for side in ("dense", "compressed"):
        scores = record["metrics"][side]["perplexity"]
        scores["ppl_a$b$_256"] = scores.pop("ppl_tiny_256")
    assert all(path.stat().st_size for path in save_pictures(record, tmp_path))
