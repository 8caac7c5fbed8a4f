"""The console in headless Chromium: charts, click to apply, playground, rollback, accessibility."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.real.console.console_suite import TOKENS, Suite, until

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
VENDOR = Path(__file__).parent / "vendor" / "axe.min.js"
UPLOT = Path(__file__).parents[3] / "controller/console/static/vendor/uPlot.iife.min.js"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (make system installs it)"),
]
charted = pytest.mark.skipif(not UPLOT.exists(), reason="no charting library (make vendor)")

PAGES = ("", "flows", "jobs?point=0", "prompts", "policies", "policies/jobs/2", "audit", "login")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


class Page:
    """One page that fails the test when its script or the content policy does."""

    def __init__(self, suite: Suite, chromium: Any, **context: Any) -> None:
        self.base = f"{suite.url}/console/"
        self.context = chromium.new_context(bypass_csp=False, **context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.amiss: list[str] = []
        self.page.on("pageerror", lambda error: self.amiss.append(str(error)))
        self.page.on("console", self._said)

    def _said(self, message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.amiss.append(message.text)

    def open(self, path: str) -> Any:
        self.page.goto(self.base + path)
        return self.page

    def login(self) -> None:
        page = self.open("login")
        page.get_by_label("Token").fill(TOKENS["operate"])
        page.get_by_role("button", name="Log in").click()
        page.get_by_role("button", name="Log out").wait_for()

    def close(self) -> None:
        self.context.close()
        assert self.amiss == []


@pytest.fixture
def page(suite: Suite, chromium: Any) -> Iterator[Page]:
    made = Page(suite, chromium)
    yield made
    made.close()


@charted
def test_charts_are_drawn_and_pages_stay_fresh(suite: Suite, page: Page) -> None:
    page.open("flows").locator('[data-chart="sizes"] canvas').wait_for()
    page.page.locator('[data-chart="time"] canvas').wait_for()
    page.page.get_by_text("Live: 3 of 3 members connected").wait_for()
    finished = page.page.locator("#domain dd").nth(4)
    before = finished.inner_text()
    page.page.wait_for_function(
        "before => document.querySelectorAll('#domain dd')[4].innerText !== before", arg=before
    )
    page.open("prompts").locator('[data-chart="spend"] canvas').wait_for()
    page.open("jobs").locator('[data-chart="timeline"] canvas').wait_for()


@charted
def test_a_click_on_a_point_shows_and_applies_it(suite: Suite, page: Page) -> None:
    page.login()
    admin = suite.admin("controller")
    before = admin.call("policy_show", application="jobs")["number"]
    shown = page.open("jobs")
    chart = shown.locator('[data-chart="front"]')
    chart.locator("canvas").wait_for()
    (left, top, href) = json.loads(chart.get_attribute("data-points"))[0]
    chart.locator(".u-over").click(position={"x": left, "y": top})
    shown.wait_for_url("**" + href)
    point = shown.locator("#point")
    point.get_by_text("unfinished jobs would end sooner").wait_for()
    assert admin.call("policy_show", application="jobs")["number"] == before, "only looked at"
    point.get_by_role("button", name="Apply point").click()
    shown.get_by_text("Issued policy").wait_for()
    issued = admin.call("policy_show", application="jobs")
    assert issued["number"] > before
    assert issued["inputs"]["index"] == int(href.partition("point=")[2].partition("#")[0])
    until(lambda: suite.admin("gpu").call("status")["policies"]["jobs"][1] == issued["number"])
    page.open(f"policies/jobs/{before}").get_by_role("button", name="Roll back to this").click()
    shown.get_by_text("Automatic policies rest until they are released").wait_for()
    shown.get_by_role("button", name="Release").click()
    shown.get_by_text("Automatic policies go on.").wait_for()


def test_the_playground_by_keyboard(suite: Suite, page: Page) -> None:
    page.login()
    shown = page.open("prompts")
    shown.get_by_label("Service type", exact=True).select_option("model_selector")
    shown.get_by_label("Prompt", exact=True).focus()
    shown.keyboard.type("Say hello")
    shown.keyboard.press("Tab")
    shown.keyboard.press("Enter")
    shown.locator(".answer").wait_for()
    assert shown.locator(".answer").inner_text() == "Hello there."
    shown.get_by_role("button", name="Regenerate").click()
    shown.locator(".answer").wait_for()


def test_the_theme_follows_the_switch_and_the_keyboard_reaches_the_content(page: Page) -> None:
    shown = page.open("")
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    light = shown.evaluate(paper)
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.textContent") == "Skip to content"
    shown.get_by_role("button", name="Dark").click()
    dark = shown.evaluate(paper)
    assert dark != light
    page.open("audit")
    assert shown.evaluate(paper) == dark, "kept"


def test_reading_needs_no_script(suite: Suite, chromium: Any) -> None:
    page = Page(suite, chromium, java_script_enabled=False)
    for path, said in (
        ("", "gpu/gpu1"),
        ("flows", "Where time goes"),
        ("jobs?point=0", "unfinished jobs would end sooner"),
        ("prompts", "model_selector"),
        ("policies?application=jobs", "bootstrap"),
    ):
        assert said in page.open(path).locator("main").inner_text(), path
    page.login()
    page.close()


@pytest.mark.skipif(not VENDOR.exists(), reason="no axe-core (make vendor)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_for_axe(suite: Suite, chromium: Any, scheme: str) -> None:
    page = Page(suite, chromium, color_scheme=scheme)
    page.login()
    found = []
    for path in PAGES:
        shown = page.open(path)
        shown.evaluate(VENDOR.read_text())  # by the debugger: the content policy stays
        # the same page in other colours: what could differ is the colours
        only = "" if scheme == "light" else ", runOnly: ['cat.color']"
        result = shown.evaluate(f"axe.run(document, {{resultTypes: ['violations']{only}}})")
        found += [
            (path, row["id"], node["html"][:120])
            for row in result["violations"]
            if row["impact"] in ("serious", "critical")
            for node in row["nodes"][:3]
        ]
    assert found == []
    page.close()
