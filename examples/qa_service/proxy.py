"""The proxy's own API as this service uses it: request, regenerate, what was prefetched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import aiohttp

TIMEOUT_S = 120.0


class ProxyError(Exception):
    """No answer; the text is the proxy's, for the log. ``busy``: worth trying again later."""

    def __init__(self, text: str, *, busy: bool = False) -> None:
        super().__init__(text)
        self.busy = busy


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer. id: for ``regenerate``. cached: nobody had to be asked."""

    id: str
    text: str
    model: str
    cost: str
    cached: bool


class Proxy:
    """Life: construct inside the loop, ``close``."""

    def __init__(self, url: str, key: str) -> None:
        self._http = aiohttp.ClientSession(
            url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
        )

    async def close(self) -> None:
        await self._http.close()

    async def ask(self, prompt: str, service_type: str, conversation: str = "") -> Reply:
        body = {"prompt": prompt, "service_type": service_type}
        if conversation:
            body["conversation"] = conversation
        return _reply(await self._call("POST", "/v1/request", body))

    async def better(self, request_id: str) -> Reply:
        return _reply(await self._call("POST", "/v1/regenerate", {"id": request_id}))

    async def followups(self, request_id: str) -> list[str]:
        """The questions likely to come next whose answers are stored already."""
        document = await self._call("GET", f"/v1/requests/{request_id}", None)
        return [str(text) for text in document.get("followups") or []]

    async def _call(self, method: str, path: str, body: dict[str, str] | None) -> dict[str, Any]:
        try:
            async with self._http.request(method, path, json=body) as response:
                document = await response.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ProxyError(f"{type(error).__name__}: {error}", busy=True) from None
        if response.status == 200 and isinstance(document, dict):
            return document
        told = document.get("error") if isinstance(document, dict) else None
        text = str(told.get("message")) if isinstance(told, dict) else f"status {response.status}"
        raise ProxyError(text, busy=response.status == 429 or response.status >= 500)


def _reply(document: dict[str, Any]) -> Reply:
    told = document["metadata"]
    cached = not any(call.get("purpose") == "answer" for call in told.get("models") or [])
    return Reply(
        document["id"], document["response"], str(told.get("model")), str(told["cost"]), cached
    )
