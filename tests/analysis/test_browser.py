"""The report in a real browser, at the width of a desk and of a telephone; skipped where there is no Chromium."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from analysis.__main__ import paper

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PROBE = """<!doctype html><iframe id="page" src="report.html" style="border:0;width:{width}px;height:900px"></iframe>
<pre id="found"></pre><script>
document.getElementById("page").onload = ({{target}}) => {{
  const page = target.contentDocument, shown = (node) => node.getClientRects().length > 0;
  const links = [...page.querySelectorAll("a[href]")].map((link) => link.getAttribute("href"));
  document.getElementById("found").textContent = JSON.stringify({{
    links: links.length,
    broken: links.filter((href) => !href.startsWith("#") || !page.getElementById(href.slice(1))),
    pictures: page.images.length,
    unseen: [...page.images].filter((image) => !image.complete || image.naturalWidth === 0).map((image) => image.alt),
    wide: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    menu: shown(page.querySelector("nav")),
    button: shown(page.querySelector("label[for=menu]")),
    first: page.querySelector("main h2").textContent,
  }});
}};
</script>"""


@pytest.fixture(scope="module")
def report(store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    for name in ("methods", "zeroshot", "calibration_size", "compression_cost"):
        store.write(folder / "results", name)
    paper(folder / "results", folder / "paper")
    return folder / "paper"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path")
@pytest.mark.parametrize("width", [1400, 420])
def test_links_pictures_and_width(report: Path, tmp_path: Path, width: int) -> None:
    probe = report / f"probe-{width}.html"
    probe.write_text(PROBE.format(width=width), encoding="utf-8")
    assert BROWSER is not None
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"),
        *(f"--user-data-dir={tmp_path}", "--virtual-time-budget=10000", "--dump-dom", probe.as_uri()),
    ]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    match = re.search(r'<pre id="found">(.+?)</pre>', dumped)
    assert match is not None, dumped[-500:]
    found = json.loads(unescape(match[1]))
    assert found["broken"] == [] and found["links"] > 20
    assert found["unseen"] == [] and found["pictures"] > 2
    assert found["wide"] <= 0, "the page scrolls sideways"
    assert (found["menu"], found["button"]) == (width > 960, width <= 960)
    assert found["first"] == "Claims"
