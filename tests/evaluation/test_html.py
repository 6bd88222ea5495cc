"""The page of an evaluation: complete, alone, and readable in a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from evaluation.html import page
from evaluation.overlay import thumbnail
from evaluation.scores import ImageScores, Scores, VolumeScores
from tests.evaluation.test_scores import label_map

VOID = {"meta", "img", "br", "link", "path", "use"}


class Reader(HTMLParser):
    """Collects links, ids and pictures, and checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.alts: list[str | None] = []
        self.heads: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [str(found["id"])] if "id" in found else []
        self.links += [str(found["href"])] if "href" in found else []
        self.fetched += [str(found["src"])] if "src" in found else []
        if tag == "img":
            self.alts.append(found.get("alt"))
        if re.fullmatch("h[1-6]", tag):
            self.heads.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def evaluated(kind: type[Scores], cases: int = 5, worse: bool = False) -> tuple[Scores, dict[str, bytes]]:
    """The more a case's number, the worse it is; the last lacks one class in both, one in either map."""
    scores = kind(["liver", "left $kidney$ <b>"], title="A & <b>", published={"name": "paper", "dice": {"mean": 80.0}})
    pictures = {}
    for case in range(cases):
        label = label_map(case, (5, 24, 24), 2)
        label = label[0] if kind is ImageScores else label
        prediction = np.roll(label, case + 2 * worse, -1)
        if case == cases - 1:
            label, prediction = np.where(label == 2, 0, label), np.where(label == 2, 2, 0)
        name = f"case <{case}> ü"
        scores.add(f"{name}.png", prediction, label)
        pictures[name] = thumbnail(None, prediction, label)
    scores.failures["x.png"] = "x.png: <no> such file"
    return scores, pictures


@pytest.mark.parametrize("kind", [VolumeScores, ImageScores])
def test_the_page_is_complete_and_alone(kind: type[Scores]) -> None:
    scores, pictures = evaluated(kind)
    text = page(scores.summary(), scores.rows(), pictures)
    found = Reader(text)
    assert len(set(found.ids)) == len(found.ids)
    assert {link[1:] for link in found.links} <= set(found.ids)
    assert all(link.startswith("#") for link in found.links)
    assert all(source.startswith("data:image/webp;base64,") for source in found.fetched)
    assert len(found.fetched) == len(pictures)
    assert all(found.alts)
    assert found.heads[0] == "h1"
    assert found.heads.count("h1") == 1
    assert not re.search(r"https?:|url\((?!#)|@import|<script|<link", text)
    assert "<b>" not in text
    assert "&lt;no&gt; such file" in text
    for protocol in scores.summary().protocols.values():
        assert protocol.rules.replace("'", "&#39;") in text
    for metric, link in (("dice", "case-"),):
        assert text.count(f'href="#{link}') >= len(pictures), metric


def test_worst_cases_come_first() -> None:
    scores, pictures = evaluated(VolumeScores)
    text = page(scores.summary(), scores.rows(), pictures)
    shown = [int(number) for number in re.findall(r"<h3>case &lt;(\d)&gt;", text)]
    dice = {}
    for row in scores.rows():
        if row.score.protocol == "strict" and row.score.dice == row.score.dice:
            dice.setdefault(int(row.case[6]), []).append(row.score.dice)
    assert shown == sorted(dice, key=lambda case: np.mean(dice[case]))
    assert shown[0] == 4
    assert "missed (1)" in text
    assert "false alarm (1)" in text


def test_it_is_the_same_each_time_and_small() -> None:
    scores, pictures = evaluated(ImageScores)
    first = page(scores.summary(), scores.rows(), pictures)
    assert first == page(scores.summary(), scores.rows(), pictures)
    rng = np.random.default_rng(0)
    smooth = np.clip(np.cumsum(rng.normal(0, 8, (3, 256, 256)), 2), 0, 255) + rng.normal(0, 3, (3, 256, 256))
    label = np.kron(label_map(1, (32, 32), 1), np.ones((8, 8), int))
    scores = ImageScores(["lesion"])
    picture = thumbnail(smooth, np.roll(label, 4, 1), label)
    for case in range(200):
        scores.add(f"{case}.png", np.roll(label, case % 9, 1), label)
    text = page(scores.summary(), scores.rows(), {str(case): picture for case in range(200)})
    assert len(text.encode()) < 2e6
    pictured = len(Reader(text).fetched)
    assert 100 < pictured < 200
    assert f"The {200 - pictured} cases that scored best have none" in text


def test_nothing_scored_is_a_page_too() -> None:
    scores = VolumeScores(["a"])
    scores.add("x", np.zeros((2, 4, 4), int), np.zeros((2, 4, 4), int))
    assert "not scored" in page(scores.summary(), scores.rows())
