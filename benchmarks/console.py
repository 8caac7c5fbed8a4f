"""First paint of the console's pages in headless Chromium, and their screenshots.

``python -m benchmarks.console --json``: starts a controller, a GPU scheduler with simulated GPUs, a
proxy on a provider of its own and an agent that reports made-up flows, opens each page in a fresh
browser context a few times and prints the median time to the first contentful paint. Bar: 1 s.
``--url`` (and ``--token-file``): an intentd that runs already, such as that of ``make up``.
``--screenshots DIR``: also writes a picture of each page, light and dark.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image  # comes with matplotlib
from playwright.sync_api import Browser, sync_playwright
from tests.real.console.console_suite import TOKENS, Suite

BAR_S = 1.0
COLOURS = 64  # of a picture; a third of the size, and no difference to be seen
PAGES = {
    "overview": "", "flows": "flows", "jobs": "jobs", "prompts": "prompts", "policies": "policies",
    "audit": "audit",
}  # fmt: skip
PAINT = """() => new Promise((done) => new PerformanceObserver((list) => {
    const first = list.getEntriesByName("first-contentful-paint")[0];
    if (first) done(first.startTime / 1000);
}).observe({type: "paint", buffered: true}))"""


def first_paints_s(browser: Browser, base: str, rounds: int) -> dict[str, list[float]]:
    """Page -> seconds from navigation to the first contentful paint, nothing cached."""
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, path in PAGES.items():
            context = browser.new_context(viewport={"width": 1280, "height": 860})
            page = context.new_page()
            page.goto(base + path)
            found.setdefault(name, []).append(page.evaluate(PAINT))
            context.close()
    return found


def screenshots(browser: Browser, base: str, token: str, where: Path) -> list[str]:
    """Pictures as an operator sees the pages, light and dark; small files."""
    where.mkdir(parents=True, exist_ok=True)
    written = []
    for scheme in ("light", "dark"):
        context = browser.new_context(
            viewport={"width": 1280, "height": 860},
            color_scheme=scheme,  # type: ignore[arg-type]  # one of two
        )
        page = context.new_page()
        if token:
            page.goto(base + "login")
            page.get_by_label("Token").fill(token)
            page.get_by_role("button", name="Log in").click()
            page.get_by_role("button", name="Log out").wait_for()
        for name in PAGES:
            page.goto(base + PAGES[name])
            if name == "jobs":
                points = page.locator("#front tbody a")
                if points.count():
                    points.first.click()
                    page.locator("#point").wait_for()
            page.get_by_text("Live:").wait_for()
            file = where / f"console-{name}{'' if scheme == 'light' else '-dark'}.png"
            picture = Image.open(io.BytesIO(page.screenshot()))
            picture.quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
            written.append(str(file))
        context.close()
    return written


def measure(url: str, token: str, args: argparse.Namespace) -> dict[str, Any]:
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    base = url.rstrip("/").removesuffix("/console") + "/console/"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=sandbox)
        paints = first_paints_s(browser, base, args.rounds)
        told: dict[str, Any] = {
            "first_paint_s": {name: round(statistics.median(t), 3) for name, t in paints.items()},
            "slowest_s": round(max(max(times) for times in paints.values()), 3),
            "rounds": args.rounds,
            "bar_s": BAR_S,
        }
        if args.screenshots is not None:
            told["screenshots"] = screenshots(browser, base, token, args.screenshots)
        browser.close()
    told["met"] = max(told["first_paint_s"].values()) < BAR_S
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="", help="of a controller that runs")
    parser.add_argument("--token-file", type=Path, help="a token to log in with for screenshots")
    parser.add_argument("--screenshots", type=Path, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if shutil.which("chromium") is None:
        print("no chromium on this machine", file=sys.stderr)
        return 1
    if args.url:
        token = args.token_file.read_text().strip() if args.token_file is not None else ""
        told = measure(args.url, token, args)
    else:
        with tempfile.TemporaryDirectory(prefix="intentd-console-") as where:
            suite = Suite(Path(where), agent="host-a", domain="rack-1")
            try:
                suite.start()
                told = measure(suite.url, TOKENS["operate"], args)
            finally:
                suite.close()
    if args.json:
        print(json.dumps(told))
    else:
        for name, value in told["first_paint_s"].items():
            print(f"{name:<10} {value:6.3f} s to the first paint (median of {args.rounds})")
        print(f"slowest of all: {told['slowest_s']} s; bar {BAR_S} s")
    return 0 if told["met"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
