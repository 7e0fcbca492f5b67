"""What a figure shows of its numbers: names, order, bars, axes."""

from dataclasses import replace
from typing import Any

import pytest

from analysis.cells import Column
from analysis.figures import FigureSpec, Line, Panel, draw, fingerprint
from analysis.style import CYCLE, LOOKS, looks
from analysis.tables import RATE, _marked

SPEC = FigureSpec("f", "A title", (), "method", Column("y", "ppl"), RATE, "removed", "perplexity")


def line(series: Any, *, spread: float = 0.0, xs: tuple = (20.0, 30.0, 40.0), high: float = 9.0) -> Line:
    return Line(series, xs, tuple(high * k / len(xs) for k in range(1, len(xs) + 1)), (spread,) * len(xs))


def legend(spec: FigureSpec, *drawn: Panel) -> list[str]:
    return [text.get_text() for of in draw(spec, drawn).legends for text in of.get_texts()]


def test_methods_are_named_in_the_order_of_their_looks_and_the_dense_model_last() -> None:
    panel = Panel("one, two", (line("sleb"), line("modegpt"), line("flap")), 4.0)
    assert legend(SPEC, panel) == ["MoDeGPT", "SLEB", "FLAP", "dense"]
    figure = draw(SPEC, [panel, replace(panel, lines=panel.lines[:1], dense=None), panel])
    assert [axis.get_visible() for axis in figure.axes] == [True, True, True, False]
    assert legend(SPEC, Panel("one", (line("sleb"),), None)) == [], "one line needs no legend"
    axis = figure.axes[0]
    assert (axis.get_title(), axis.get_xlabel(), axis.get_ylabel()) == ("one\ntwo", "removed", "perplexity")
    colours = {artist.get_label(): artist.lines[0].get_color() for artist in axis.containers}
    assert colours["SLEB"] == LOOKS["sleb"][0] and colours["MoDeGPT"] == LOOKS["modegpt"][0]


def test_lines_of_rates_say_what_is_removed_and_others_what_they_are() -> None:
    panel = Panel("one", (line(0.3), line(0.05)), None)
    assert legend(replace(SPEC, series=RATE), panel) == ["5 % removed", "30 % removed"]
    assert legend(replace(SPEC, series="seed"), panel) == ["0.05", "0.3"]


def test_bars_are_explained_where_there_are_any() -> None:
    with_bars, without = Panel("one", (line("sleb", spread=0.5),), None), Panel("one", (line("sleb"),), None)
    titles = [draw(SPEC, drawn).get_suptitle() for drawn in ([without], [with_bars], [without, with_bars])]
    bars = "(bars: sample standard deviation over seeds)"
    assert titles == ["A title", f"A title\n{bars}", f"A title {bars}"]
    [container] = draw(SPEC, [with_bars]).axes[0].containers
    [segments] = [each.get_segments() for each in container.lines[2]]
    assert [end[1] for segment in segments for end in segment] == pytest.approx([2.5, 3.5, 5.5, 6.5, 8.5, 9.5])
    assert draw(SPEC, [without]).axes[0].containers[0].lines[2] == ()


def test_an_axis_of_many_decades_is_logarithmic_and_one_of_names_begins_at_zero() -> None:
    wide, narrow = (Panel("one", (line("sleb", high=high, xs=xs),), None)
                    for high, xs in ((90.0, tuple(range(1, 31))), (9.0, (1.0, 2.0))))  # fmt: skip
    log = replace(SPEC, log_y=True, log_x=True)
    assert [draw(log, [panel]).axes[0].get_yscale() for panel in (wide, narrow)] == ["log", "linear"]
    assert draw(log, [narrow]).axes[0].get_xscale() == "log" and draw(SPEC, [wide]).axes[0].get_yscale() == "linear"
    names = draw(SPEC, [Panel("one", (line("sleb", xs=("a", "b")),), None)]).axes[0]
    assert names.get_ylim() == pytest.approx((0, 9.9)) and names.containers[0].lines[0].get_linestyle() == "None"
    assert draw(replace(SPEC, point="layer"), [wide]).axes[0].get_ylim()[0] == 0


def test_a_fingerprint_changes_with_every_number_and_title() -> None:
    panel = Panel("one", (line("sleb"),), 4.0)
    other = [
        (replace(SPEC, title="Another"), panel),
        (replace(SPEC, x_label="kept"), panel),
        (replace(SPEC, y_label="accuracy"), panel),
        *(
            (SPEC, changed)
            for changed in (replace(panel, dense=4.1), replace(panel, lines=(line("sleb", spread=0.1),)))
        ),
    ]
    assert len({fingerprint(spec, [drawn]) for spec, drawn in [(SPEC, panel), *other]}) == len(other) + 1


def test_methods_keep_their_looks_and_others_take_turns() -> None:
    of_methods = looks(["sleb", "variant", "modegpt", "other"], of_methods=True)
    assert of_methods == {
        "sleb": LOOKS["sleb"], "variant": CYCLE[1], "modegpt": LOOKS["modegpt"], "other": CYCLE[2],
    }  # fmt: skip
    others = looks(["svd", "random", "cr"], of_methods=False)
    assert others == {"svd": CYCLE[0], "random": LOOKS["random"], "cr": CYCLE[1]}


@pytest.mark.parametrize(
    ("means", "better", "digits", "marks"),
    [
        ((1.234, 1.236, 2.0), "lower", 2, {0: "best", 1: "second"}),
        ((1.234, 1.236, 2.0), "lower", 1, {0: "best", 1: "best", 2: "second"}),
        ((1.234, 1.236, 2.0), "higher", 2, {2: "best", 1: "second"}),
        ((1.0, None, 3.0, 2.0), "lower", 2, {0: "best", 3: "second"}),
        ((1.0, 2.0, None), "lower", 2, {}),
        ((1.0, 1.0, 1.0), "lower", 2, {}),
        ((1.0, 2.0, 3.0), None, 2, {}),
        ((1234.0, 1236.0, 2000.0), "lower", -2, {0: "best", 1: "best", 2: "second"}),
    ],
)
def test_best_and_second_are_of_three_or_more_as_they_are_printed(
    means: tuple, better: str | None, digits: int, marks: dict[int, str]
) -> None:
    assert dict(_marked(list(enumerate(means)), Column("c", "m", better, digits=digits))) == marks
