"""What counts as overhead of a sweep."""

from tests.scripts import load_script


def test_what_is_computed_again_is_overhead() -> None:
    module = load_script("benchmarks/sweep_cost")

    def record(**seconds: float) -> dict:
        return {
            "cost": {"stages": [{"name": name.replace("_", " "), "seconds": value} for name, value in seconds.items()]}
        }

    first = record(loading=1, influence=4, statistics=2, dense_evaluation=3, compressed_evaluation=5)
    reusing = record(loading=1, influence=0.25, statistics=0.25, dense_evaluation=0.5, compressed_evaluation=6)
    seconds, unavoidable = module.account([first, reusing])
    assert unavoidable == 4 + 2 + 3 + 5 + 6 and seconds.total() == unavoidable + 1 + 1 + 0.5 + 0.5
    again = module.account([first, first])
    assert again[1] == 4 + 2 + 3 + 5 + 5 and again[0]["influence"] == 8
