"""Progress bars with time left, or none at all."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


@dataclass(frozen=True)
class Progress:
    """Where long loops report: bars on standard error, or silence when ``quiet``."""

    quiet: bool = False

    def track(self, items: Iterable[Item], description: str, total: int | None = None, unit: str = "it") -> Iterator[Item]:
        """Yield ``items`` behind a bar that shows the rate and the time left."""
        return iter(tqdm(items, desc=description, total=total, unit=unit, disable=self.quiet, leave=False, dynamic_ncols=True))

    def bar(self, total: int, description: str, unit: str = "it") -> tqdm:
        """A bar to ``update`` by hand; a context manager."""
        return tqdm(total=total, desc=description, unit=unit, disable=self.quiet, leave=False, dynamic_ncols=True)

    def say(self, line: str) -> None:
        """Print one line without tearing a bar."""
        if not self.quiet:
            tqdm.write(line)
