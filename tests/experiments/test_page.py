"""The page of a table: in a browser it fits a phone, fetches nothing, and its links lead somewhere; names are text."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from experiments.page import page, write_table
from experiments.table import tabulate
from tests.experiments.conftest import TINY, MakePlan, evaluated, finish

pytestmark = pytest.mark.usefixtures("known_costs")


@pytest.fixture
def written(make_plan: MakePlan, tmp_path: Path) -> Path:
    """A page with everything that may be on one."""
    rows = {"A paper with a long name": {"iou": 71.5, "iou_sd": 2.4, "f1": 79.8}}
    published = {"protocol": "per image", "row": "CMUNeXt", "rows": rows}
    entry = {"bundle": "cmunext_busi", "data": str(tmp_path / "data"), "published": published}
    for fold in (1, 2):
        evaluated(tmp_path / f"outside{fold}", fold, 2)
    results = {fold: str(tmp_path / f"outside{fold}") for fold in (1, 2)}
    plan = make_plan(
        bundles={"recipe": entry}, zero_shot={"other": "other"}, external={"nnU-Net (theirs)": {"results": results}}
    )
    for cell in plan.cells:
        finish(cell, 3 + 2 * (cell.network == "BasicUNet") + (cell.fold or 0))
    write_table(plan.output, tabulate(plan))
    return plan.output / "table.html"


def test_it_is_read_anywhere(written: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install -e .[test])")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        for width in (390, 1280):
            tab = browser.new_page(viewport={"width": width, "height": 800})
            asked: list[str] = []
            tab.on("request", lambda request, asked=asked: asked.append(request.url))
            tab.goto(written.as_uri())
            assert asked == [written.as_uri()]
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            links = tab.eval_on_selector_all("nav a", "links => links.map(link => link.getAttribute('href'))")
            assert len(links) == 3
            assert all(tab.query_selector(link) for link in links)
            assert tab.locator("figure svg").count() == 2
            assert tab.locator("th:has-text('nnU-Net (theirs)') span").first.inner_text() == "external"
        browser.close()


def test_names_are_text(make_plan: MakePlan, tmp_path: Path) -> None:
    entry = {"bundle": "cmunext_busi", "data": str(tmp_path / "<b>&data")}
    plan = make_plan(bundles={"recipe": entry}, networks={"CMUNeXt": TINY["CMUNeXt"]}, baseline="CMUNeXt")
    for cell in plan.cells:
        finish(cell, 3)
    text = page(tabulate(plan))
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;data" in text
