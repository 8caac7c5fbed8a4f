"""The OpenAPI document says what the server does: the same doors, the same methods."""

from __future__ import annotations

from typing import Any

from intentd.proxy.openapi import PATHS


async def test_every_door_is_described_and_no_other(site: Any) -> None:
    proxy = await site.start()
    _, document, _ = await site.get("/openapi.json")
    assert document["openapi"] == "3.1.0"
    assert "model_selector" in document["info"]["description"]
    for path, (methods, _) in proxy.api._routes.items():
        assert set(document["paths"][path]) == set(methods.lower().split()), path
    for path, methods in document["paths"].items():
        for method in methods:
            target = path.replace("{id}", "x")
            async with site.session.request(method, site.url + target, data=b"{}") as response:
                answer = await response.json()
            code = answer.get("error", {}).get("code")
            assert response.status != 405, (method, path)
            assert code != "unknown_path" or path.startswith("/v1/cache"), (method, path)


def test_required_fields_are_described() -> None:
    for path, methods in PATHS.items():
        for summary, body in methods.values():
            assert summary.endswith("."), path
            if body is not None:
                assert set(body.get("required", ())) <= set(body.get("properties", ())), path
