"""The pages in a browser: nothing is fetched, links lead somewhere, and they can be read on a phone and on paper."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from evaluation.__main__ import main
from evaluation.results import COMPARISON_PAGE, REPORT, write_results
from evaluation.scores import ImageScores, Scores, VolumeScores
from tests.evaluation.test_html import evaluated

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install -e .[test])")
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM)
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of both kinds, and what compare writes of two of each."""
    found = {}
    folder = tmp_path_factory.mktemp("pages")
    kinds: dict[str, type[Scores]] = {"volumes": VolumeScores, "images": ImageScores}
    for name, kind in kinds.items():
        results = []
        for cases_are in ("good", "bad"):
            scores, pictures = evaluated(kind, worse=cases_are == "bad")
            results.append(folder / name / f"{cases_are} results of a model with a long name")
            write_results(results[-1], scores.summary(), scores.rows(), pictures)
        main(["compare", *map(str, results), "--output", str(folder / name)])
        found |= {name: results[0] / REPORT, f"{name} compared": folder / name / COMPARISON_PAGE}
    return found


@pytest.mark.parametrize("name", ["volumes", "images", "volumes compared", "images compared"])
def test_it_is_read_anywhere(name: str, browser: Any, pages: dict[str, Path]) -> None:
    for size in (PHONE, DESKTOP):
        page = browser.new_page(viewport=size)
        asked: list[str] = []
        said: list[str] = []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.on("console", lambda message, said=said: said.append(message.text))
        page.goto(pages[name].as_uri())
        assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
        assert said == []
        wide = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
        assert page.evaluate(wide) <= size["width"]
        cut = "[...document.querySelectorAll('.card .scroll')].filter(one => one.scrollWidth > one.clientWidth).length"
        # a long name beside four metrics is scrolled, and shows it
        assert page.evaluate(cut) <= ("images" in name)
        broken = "[...document.images].filter(one => one.naturalWidth === 0).length"
        assert page.evaluate("document.images.length") >= 5
        assert page.evaluate(broken) == 0
        page.close()


@pytest.mark.parametrize("name", ["volumes", "images", "volumes compared", "images compared"])
def test_links_lead_to_what_they_name(name: str, browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport=PHONE)
    page.goto(pages[name].as_uri())
    missing = "[...document.querySelectorAll('a')].filter(a => !document.getElementById(" \
        "decodeURIComponent((a.getAttribute('href') || a.getAttribute('xlink:href')).slice(1)))).length"  # fmt: skip
    assert page.evaluate(missing) == 0
    point = page.locator("svg a").first
    point.focus()
    page.keyboard.press("Enter")
    target = point.get_attribute("href").removeprefix("#")
    card = page.locator(f"[id='{target}']")
    assert card.evaluate("one => one.matches(':target')")
    assert card.evaluate("one => one.getBoundingClientRect().top") < PHONE["height"]
    picture = page.locator("summary img").first
    small = picture.bounding_box()["height"]
    page.locator("summary").first.click()
    assert picture.bounding_box()["height"] > small
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.close()


@pytest.mark.parametrize("name", ["volumes", "images compared"])
def test_dark_mode_and_paper_have_ink_that_is_seen(name: str, browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport=DESKTOP)
    page.goto(pages[name].as_uri())
    light = {}
    for media, scheme, dark in (("screen", "dark", True), ("screen", "light", False), ("print", "dark", False)):
        page.emulate_media(media=media, color_scheme=scheme)
        paper, *inks = (
            sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(", ")))
            for colour in page.evaluate(
                "['body', 'h1', 'td', 'svg text', 'td span'].map((name, index) => { const found = "
                "getComputedStyle(document.querySelector(name)); return index == 0 ? found.backgroundColor : "
                "name == 'svg text' ? found.fill : found.color; })"
            )
        )
        assert (paper < 150) == dark
        assert all(abs(ink - paper) > 300 for ink in inks), (media, scheme, paper, inks)
        light[media, scheme] = paper
    # on paper nothing lies beside the page
    page.set_viewport_size({"width": 718, "height": 1000})
    clipped = "[...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > 718).length"
    assert page.evaluate(clipped) == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 718
    page.close()


@pytest.mark.parametrize("name", ["images", "volumes compared"])
def test_a_screen_reader_finds_its_way(name: str, browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page()
    page.goto(pages[name].as_uri())
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(one => +one.tagName[1])")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.evaluate("[...document.images].every(one => one.alt.length > 20)")
    assert page.evaluate("[...document.querySelectorAll('tbody tr')].every(one => one.querySelector('th[scope=row]'))")
    assert page.evaluate("[...document.querySelectorAll('thead th')].every(one => one.scope === 'col')")
    assert page.evaluate("[...document.querySelectorAll('figure')].every(one => one.ariaLabel)")
    assert page.evaluate("document.documentElement.lang") == "en"
    page.close()
