"""intentctl prompts cache: what the proxy on this machine has stored, and objects for its users."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from intentd.core.errors import InputError
from intentd.core.prompts.money import format_dollars
from intentd.daemons.ctl.output import JsonOption, message, print_json, print_table
from intentd.daemons.ctl.reach import admin_client

app = typer.Typer(help="Stored answers and objects of the proxy.", no_args_is_help=True)

OwnerOption = Annotated[
    str,
    typer.Option(help="Whose: all (everybody sees it), tenant:NAME or key:NAME."),
]
SourceOption = Annotated[str, typer.Option(help="Only of this source.")]
SHOWN_CHARS = 60
PUT_TIMEOUT_S = 600.0


@app.command("stats")
def stats(as_json: JsonOption = False) -> None:
    """What is stored, what it saved, and the gate's thresholds."""
    page = admin_client("proxy").call("cache.stats")
    if as_json:
        print_json(page)
        return
    rows = [
        ("items", f"{page['items']} ({page['put_items']} put)"),
        ("bytes", page["size_bytes"]),
        ("semantic", page["embedder"] or ("not used yet" if page["semantic_available"] else "no")),
        ("vectors", f"{page['vectors']} ({page['waiting_for_vectors']} to be made)"),
        ("gate", f"{page['gate'] or '-'} {page['threshold'] if page['gate'] else ''}".strip()),
        ("avoided", format_dollars(page["avoided_nano"])),
    ]
    print_table(("figure", "value"), [(name, str(value)) for name, value in rows])
    if page["lookups"]:
        print_table(("service type", "result", "requests"), page["lookups"], title="lookups")
    if page["thresholds"]:
        print_table(
            ("tenant", "threshold"), sorted(page["thresholds"].items()), title="moved by feedback"
        )


@app.command("list")
def list_items(
    owner: OwnerOption = "all",
    source: SourceOption = "",
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 100,
    after: Annotated[int, typer.Option(min=0, help="Go on after a page's end.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Items in the order they were stored."""
    fields: dict[str, Any] = {"limit": limit, "after": after}
    if source:
        fields["source"] = source
    _show(admin_client("proxy").call("cache.list", owner=owner, fields=fields), as_json)


@app.command("get")
def get(
    key: Annotated[str, typer.Argument(help="A text; the nearest items are shown.")],
    owner: OwnerOption = "all",
    source: SourceOption = "",
    types: Annotated[
        list[str] | None, typer.Option("--type", help="Only keys of this type (repeat for more).")
    ] = None,
    min_similarity: Annotated[float, typer.Option(min=-1.0, max=1.0)] = 0.0,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 10,
    as_json: JsonOption = False,
) -> None:
    """Find items by what a text means."""
    fields: dict[str, Any] = {"key": key, "min_similarity": min_similarity, "limit": limit}
    if source:
        fields["source"] = source
    if types:
        fields["type"] = ",".join(types)
    _show(admin_client("proxy").call("cache.get", owner=owner, fields=fields), as_json)


@app.command("put")
def put(
    files: Annotated[list[Path], typer.Argument(help="Documents; - reads the standard input.")],
    owner: OwnerOption = "all",
    kind: Annotated[str, typer.Option(help="auto, prose, faq, sections or code.")] = "auto",
    model: Annotated[
        str, typer.Option(help="Model that writes the keys; rules: none. Empty: as configured.")
    ] = "",
    source: Annotated[
        str, typer.Option(help="Name to delete or replace it by. Empty: the file's name.")
    ] = "",
    ttl: Annotated[str, typer.Option(help="Kept for so long, such as 720h. Empty: for ever.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Cut documents into pieces, give these keys, and store them; the same source is replaced."""
    from intentd.core.units import parse_duration_s

    if source and len(files) > 1:
        raise InputError("--source", source, "one file beside it")
    made = []
    for path in files:
        fields: dict[str, Any] = {
            "object": {"document": _text(path)},
            "source": source or ("stdin" if str(path) == "-" else path.name),
            "kind": kind,
        }
        if model:
            fields["model"] = model
        if ttl:
            fields["ttl_s"] = parse_duration_s(ttl, "ttl")
        client = admin_client("proxy", timeout_s=PUT_TIMEOUT_S)
        page = client.call("cache.put", owner=owner, fields=fields)
        made.append({"source": fields["source"], **page})
        if not as_json:
            by = f"{page['keys_by_model']} of them keyed by a model"
            message(f"{fields['source']}: {page['kind']}, {page['pieces']} pieces, {by}")
    if as_json:
        print_json({"documents": made})


@app.command("delete")
def delete(
    item: Annotated[str, typer.Argument(help="An item's id.")] = "",
    owner: OwnerOption = "all",
    source: Annotated[str, typer.Option(help="Everything of this source.")] = "",
    every: Annotated[bool, typer.Option("--all", help="Everything of this owner.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Forget an item, a source, or all that an owner has."""
    if bool(item) + bool(source) + every != 1:
        raise InputError("delete", item or source or "nothing", "an id, --source or --all")
    fields = {"id": item} if item else {"source": source} if source else {"all": "true"}
    page = admin_client("proxy").call("cache.delete", owner=owner, fields=fields)
    if as_json:
        print_json(page)
    else:
        message(f"{page['deleted']} items deleted")


def _text(path: Path) -> str:
    if str(path) == "-":
        return sys.stdin.read()
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError("file", str(path), f"a readable file ({error.strerror})") from None


def _show(page: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(page)
        return
    found = page["data"] and "similarity" in page["data"][0]
    print_table(
        (
            "id",
            "similarity" if found else "age",
            "source",
            "matched" if found else "prompt",
            "text",
        ),
        [
            (
                row["id"],
                f"{row['similarity']:.3f}" if found else f"{row['age_s']:.0f} s",
                row["source"],
                _short(f"{row['type']}: {row['key']}" if found else row["prompt"]),
                _short(row["response"]),
            )
            for row in page["data"]
        ],
    )
    if page.get("has_more"):
        message(f"more: --after {page['after']}")


def _short(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= SHOWN_CHARS else plain[: SHOWN_CHARS - 1] + "…"
