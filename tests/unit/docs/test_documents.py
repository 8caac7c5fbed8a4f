"""The documents against the tree: links, commands, targets, modules, endpoints, admin commands."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from intentd.agent.daemon import AgentDaemon
from intentd.controller import api as controller_api
from intentd.controller.commands import answer
from intentd.controller.jobs_admin import JobsAdmin
from intentd.daemons.ctl.daemon import DAEMONS
from intentd.daemons.ctl.main import app
from intentd.daemons.gpu import api as gpu_api
from intentd.daemons.kit.lifecycle import Lifecycle
from intentd.proxy.cache.admin import cache_admin
from intentd.proxy.daemon import ProxyDaemon
from intentd.proxy.openapi import PATHS

ROOT = Path(__file__).parents[3]
DOCUMENTS = sorted(
    path
    for folder in (".", "docs", "docs/adr", "examples", "agent")
    for path in ROOT.joinpath(folder).glob(
        "*.md" if folder in (".", "docs", "docs/adr") else "**/*.md"
    )
)
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


@cache
def prose(path: Path) -> str:
    """The text without code blocks that are fenced."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)


@cache
def anchors(path: Path) -> set[str]:
    """What `#...` may name: headings, as the usual renderers make them."""
    titles = re.findall(r"^#+ (.*)$", prose(path), re.M)
    plain = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_links_lead_somewhere(path: Path) -> None:
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if "://" in link or link.startswith("mailto:"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


def code(text: str) -> str:
    """What stands in backticks, in fences or indented; a line each."""
    spans = [span for line in text.splitlines() for span in re.findall(r"`([^`]+)`", line)]
    return "\n".join([*re.findall(r"^(?:    |```).*$|^.*$(?=\n```)", text, re.M), *spans])


def complaint_about(words: list[str]) -> str:
    """What is wrong with `intentctl WORDS`; empty when it exists."""
    here: Any = typer.main.get_command(app)
    context = typer.Context(here)
    for word in words:
        if not hasattr(here, "get_command"):
            return ""
        found = here.get_command(context, word)
        if found is None:
            return f"{here.name or 'intentctl'} has no {word}"
        here = found
    return ""


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_commands_targets_and_modules_exist(path: Path) -> None:
    text = path.read_text()
    wrong = []
    for said in re.findall(r"\bintentctl((?: [a-z][a-z-]*\b(?![/.=:]))+)", code(text)):
        wrong += filter(None, [complaint_about(said.split())])
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    wrong += [
        f"make {name}" for name in re.findall(r"`make ([a-z-]+)[ `]", text) if name not in targets
    ]
    for name in re.findall(r"python -m (benchmarks|intentd)((?:\.[a-z_]+)*)", text):
        module = ROOT.joinpath("src" if name[0] == "intentd" else ".", *"".join(name).split("."))
        if not (module.with_suffix(".py").exists() or (module / "__main__.py").exists()):
            wrong.append("".join(name))
    assert wrong == []


def endpoints() -> Iterator[tuple[str, str]]:
    """METHOD PATH and what it does, of every API."""
    for operation in (*controller_api.READS, *controller_api.CHANGES, *gpu_api.OPERATIONS):
        yield f"{operation.method} {operation.path}", operation.summary
    for path, methods in PATHS.items():
        for method, (summary, _) in methods.items():
            yield f"{method.upper()} {path}", summary


def commands() -> dict[str, set[str]]:
    """Role -> the commands its admin socket knows; "" for those of every daemon."""
    sources: dict[str, list[Any]] = {
        "": [Lifecycle.handle_admin],
        "agent": [AgentDaemon.admin],
        "controller": [answer, JobsAdmin.answer],
        "proxy": [ProxyDaemon.admin, cache_admin],
        "sequencer": [],
    }
    found = {
        role: {
            name
            for source in held
            for line in re.findall(
                r"^ +(?:case|if command ==) (.*):$", inspect.getsource(source), re.M
            )
            for name in re.findall(r'"([a-z_.]+)"', line)
        }
        for role, held in sources.items()
    }
    found["gpu"] = {f"jobs.{operation.name}" for operation in gpu_api.OPERATIONS}
    return found


def test_operations_names_every_endpoint_and_admin_command() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    rows = {f"| `{name}` | {summary} |" for name, summary in endpoints()}
    assert sorted(row for row in rows if row not in text) == []
    assert set(commands()) == {"", *DAEMONS}
    table = text.partition("\n| daemon | commands |\n")[2].partition("\n\n")[0]
    for role, known in commands().items():
        row = re.search(rf"^\| {role or 'every daemon'} \| (.*) \|$", table, re.M)
        assert row, role
        assert set(re.findall(r"`([a-z_.]+)`", row[1])) == known, role
