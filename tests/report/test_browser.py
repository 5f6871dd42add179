"""The report in a real browser: nothing on the console, nothing over the network, every figure
drawn, numbers as in the JSON."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.synthetic_audits import make_audit
from thermo_opt.audits import Audit
from thermo_opt.lenses import SUMMARY_KEYS, summaries_json
from thermo_opt.report import write_drift_front, write_report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
HOSTILE = (
    '<script>window.pwned=1</script>"\'</h2><img src=x onerror="window.pwned=1"> %{x} <b>b</b>'
)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ,
    reason="no Chromium on this machine (apt-get install chromium)",
)

LUMINANCE = """
const channels = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
const luminance = (text) => channels(text).slice(0, 3)
  .map((c) => c / 255).map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const contrast = (a, b) => {
  const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
  return (x + 0.05) / (y + 0.05); };
const style = (element) => getComputedStyle(element);
const page = style(document.body).backgroundColor;
"""


@pytest.fixture(scope="module")
def audits() -> list[Audit]:
    return [
        make_audit("adam", parameters=True, state=True),
        make_audit("sgd with a name that goes on and on", noise=2, seed=1, parameters=True),
        make_audit(HOSTILE, noise=1, seed=2),
        make_audit("weights only", outputs=False, state=True),
    ]


@pytest.fixture(scope="module")
def report(audits: list[Audit], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(audits, tmp_path_factory.mktemp("a page") / "Bericht é.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None, "the continuous build needs Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Opened:
    """A page, with all that it said and asked for while it loaded."""

    def __init__(self, browser: Browser, path: Path, **options: Any) -> None:
        self.said: list[str] = []
        self.requested: list[str] = []
        self.page: Page = browser.new_context(**options).new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-drawn=true]", timeout=60_000)


@pytest.fixture(scope="module")
def desktop(browser: Browser, report: Path) -> Opened:
    return Opened(browser, report, viewport={"width": 1200, "height": 900}, color_scheme="light")


@pytest.fixture(scope="module")
def phone(browser: Browser, report: Path) -> Opened:
    options: dict[str, Any] = {
        "viewport": {"width": 390, "height": 844},
        "is_mobile": True,
        "has_touch": True,
    }
    return Opened(browser, report, **options)


def test_silent_and_offline(desktop: Opened, report: Path) -> None:
    assert desktop.said == []
    assert desktop.requested == [report.as_uri()]


def test_every_figure_is_drawn_with_its_data(desktop: Opened) -> None:
    drawn = desktop.page.evaluate(
        """() => [...document.querySelectorAll(".plot")].map((plot) => ({
             key: plot.id, traces: plot.data.length,
             marks: plot.querySelectorAll(
                ".scatterlayer .js-line, .scatterlayer .point, " +
                ".bars .point path, .hm image").length,
             points: plot.data.reduce((n, t) => n + (t.x || []).length, 0)}))"""
    )
    keys = [figure["key"] for figure in drawn]
    assert keys == [
        "decomposition",
        "loss-and-dissipation",
        "alignment",
        "trajectory-map",
        "coarse-graining",
        "dissipation-heatmap",
        "predicted-vs-realised",
    ]
    for figure in drawn:
        assert figure["marks"] >= figure["traces"] > 0, figure
        assert figure["points"] > 0


def test_numbers_equal_the_json(desktop: Opened, audits: list[Audit]) -> None:
    embedded = json.loads(desktop.page.inner_text("#thermo-opt-summaries"))
    assert embedded == json.loads(summaries_json(audits))
    cells = desktop.page.evaluate(
        """() => [...document.querySelectorAll("td[data-key]")].map((c) =>
             [c.dataset.key, Number(c.dataset.column), c.dataset.value, c.innerText])"""
    )
    words = {"run", "lens", "notes", "step_unit", "every_step", "sketch", "held_by"}
    words |= {"split", "counterfactual", "rounding"}
    apart = {"displacement_alignment", "alignment_lower_rest"}  # said in sentences
    assert {cell[0] for cell in cells} == set(SUMMARY_KEYS) - words - apart
    for key, column, value, text in cells:
        truth = embedded["runs"][column][key]
        assert json.loads(value) == truth
        if truth is None:
            assert text == "–"
        elif isinstance(truth, float):
            assert _read(text) == pytest.approx(truth, rel=5e-3)


def test_bars_show_the_json(desktop: Opened) -> None:
    embedded = json.loads(desktop.page.inner_text("#thermo-opt-summaries"))["runs"]
    bars = desktop.page.evaluate(
        "() => document.getElementById('decomposition').data.map((t) => t.x)"
    )
    outputs = [summary for summary in embedded if summary["lens"] == "outputs"]
    assert bars == [
        [summary[part] for summary in outputs] for part in ("irreducible", "detour", "pacing")
    ]


def test_hostile_names_are_only_text(desktop: Opened) -> None:
    assert desktop.page.evaluate("() => window.pwned") is None
    assert desktop.page.locator("article.run h2").all_inner_texts()[2] == HOSTILE
    label = desktop.page.locator("#decomposition .annotation-text").all_text_contents()[2]
    assert label.startswith("<script>")
    assert desktop.page.locator("img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(browser: Browser, report: Path, scheme: str) -> None:
    opened = Opened(browser, report, viewport={"width": 1200, "height": 900}, color_scheme=scheme)
    found = opened.page.evaluate(
        "() => {"
        + LUMINANCE
        + """
        const texts = [...document.querySelectorAll(
            "p, h1, h2, th, td, li, dt, dd, code, figcaption, footer, button")];
        const labels = [...document.querySelectorAll(".plot text")].filter((t) => t.textContent);
        const lines = [...document.querySelectorAll(".scatterlayer .js-line")]
            .filter((l) => style(l).strokeWidth !== "0px");
        return {
          text: Math.min(...texts.map((t) => contrast(style(t).color, page))),
          labels: Math.min(...labels.map((t) => contrast(style(t).fill, page))),
          lines: Math.min(...lines.map((l) => contrast(style(l).stroke, page))),
          dark: luminance(page) < 0.1};
        }"""
    )
    assert found["dark"] == (scheme == "dark")
    assert found["text"] >= 4.5
    assert found["labels"] >= 4.5
    assert found["lines"] >= (3 if scheme == "dark" else 2)
    assert opened.said == []


def test_phone_has_no_sideways_scroll(phone: Opened) -> None:
    widest = phone.page.evaluate(
        """() => ({page: document.documentElement.scrollWidth,
             plots: Math.max(...[...document.querySelectorAll(".plot .main-svg")]
                .map((s) => s.getBoundingClientRect().right))})"""
    )
    assert widest["page"] <= 390
    assert widest["plots"] <= 390
    assert phone.said == []


def test_phone_fingers_scroll_rather_than_zoom(phone: Opened) -> None:
    modes = phone.page.evaluate(
        "() => [...document.querySelectorAll('.plot')].map((p) => p._fullLayout.dragmode)"
    )
    assert set(modes) == {False}


def test_hiding_a_run_and_changing_to_dark_mode(browser: Browser, report: Path) -> None:
    page = Opened(
        browser, report, viewport={"width": 1200, "height": 900}, color_scheme="light"
    ).page
    button = page.locator("nav.toggle button").first
    visible = """() => document.getElementById("loss-and-dissipation").data
                   .filter((t) => t.meta.run === 0).every((t) => t.visible)"""
    colour = "() => getComputedStyle(document.querySelector('#alignment .xtick text')).fill"
    assert page.evaluate(visible)
    light = page.evaluate(colour)
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    _until(page, visible, False)
    page.emulate_media(color_scheme="dark")
    _until(page, f"() => ({colour})() !== {json.dumps(light)}", True)
    assert not page.evaluate(visible)
    button.click()
    _until(page, visible, True)


def test_structure_for_readers_who_do_not_see_it(desktop: Opened) -> None:
    page = desktop.page
    assert page.locator("h1").count() == 1
    levels = page.evaluate(
        "() => [...document.querySelectorAll('h1, h2, h3')].map((h) => Number(h.tagName[1]))"
    )
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.locator("html").get_attribute("lang") == "en"
    for plot in page.locator(".plot").all():
        assert plot.get_attribute("role") == "img"
        assert len(plot.get_attribute("aria-label") or "") > 20
    assert page.locator("table th:not([scope])").count() == 0
    assert page.locator("[role=region][tabindex='0'][aria-label]").count() == 1
    for axis in ("#alignment .ytitle", "#alignment .xtitle", "#coarse-graining .y2title"):
        assert (page.locator(axis).text_content() or "").strip()


def test_a_front_on_drift_on_a_phone_and_a_desk(browser: Browser, tmp_path: Path) -> None:
    rows = [
        ("adam", "Adam", 120.0, 0.02, 0.05),
        ("sgd", "SGD", 300.0, 0.4, 0.03),
        (HOSTILE, "Adam", 90.0, 0.08, 0.0),
    ]
    table = pd.DataFrame(rows, columns=["run", "group", "time", "noise", "drift"])
    table = table.assign(
        target_loss=0.5, censored=False, on_front=True, noise_error=0.01, drift_error=0.01
    )
    table.attrs |= {"x": "steps", "clock": "step", "notes": []}
    page = write_drift_front(table, tmp_path / "drift.html")
    for width in (360, 1280):
        opened = Opened(browser, page, viewport={"width": width, "height": 800})
        assert opened.said == []
        found = opened.page.evaluate(
            """() => ({wide: document.documentElement.scrollWidth,
                 points: document.querySelectorAll("#front-0 .scatterlayer .point").length,
                 text: document.querySelector("figcaption").innerText})"""
        )
        assert found["wide"] <= width
        assert found["points"] == 2 + 3  # a drift of zero has no place on a logarithmic axis
        assert "Not drawn: 1" in found["text"]


def _until(page: Page, expression: str, value: bool) -> None:
    """Wait for a redraw (Playwright's own waiting needs eval, which the page's policy forbids)."""
    for _ in range(100):
        if page.evaluate(expression) is value:
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"{expression} did not become {value}")


def _read(text: str) -> float:
    digits = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    text = text.replace("\u202f", "").replace("\u2009", "").lstrip("≈≥≤ ")
    mantissa, _, exponent = text.partition("×10")
    if text.startswith("10") and not exponent and any(c in "⁻⁰¹²³⁴⁵⁶⁷⁸⁹" for c in text):
        mantissa, exponent = "1", text[2:]
    return float(mantissa) * 10.0 ** int(exponent.translate(digits) or 0)
