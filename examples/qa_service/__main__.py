"""``python -m examples.qa_service``: the service beside a running proxy."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from pathlib import Path

from aiohttp import web
from examples.qa_service.proxy import Proxy
from examples.qa_service.service import QaService
from examples.qa_service.store import Store
from examples.qa_service.web import Web
from examples.qa_service.whatsapp import Settings, WhatsApp

WHATSAPP = ("PHONE_NUMBER_ID", "TOKEN", "APP_SECRET", "VERIFY_TOKEN")


def whatsapp_settings() -> Settings | None:
    """From WHATSAPP_PHONE_NUMBER_ID and its like; None without any of them."""
    found = {name: os.environ.get(f"WHATSAPP_{name}", "") for name in WHATSAPP}
    missing = [f"WHATSAPP_{name}" for name, value in found.items() if not value]
    if len(missing) == len(WHATSAPP):
        return None
    if missing:
        sys.exit(f"WhatsApp needs all of its settings; not set: {', '.join(missing)}")
    graph = os.environ.get("WHATSAPP_GRAPH", Settings.graph)
    return Settings(
        found["PHONE_NUMBER_ID"], found["TOKEN"], found["APP_SECRET"], found["VERIFY_TOKEN"], graph
    )


async def serve(options: argparse.Namespace) -> None:
    store = Store(options.state)
    proxy = Proxy(options.proxy, os.environ.get("INTENTD_API_KEY", ""))
    service = QaService(proxy, store)
    settings = whatsapp_settings()
    whatsapp = WhatsApp(settings, service) if settings is not None else None
    runner = web.AppRunner(Web(service, whatsapp).application(), access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", options.port)
        await site.start()
        port = runner.addresses[0][1]
        print(f"http://127.0.0.1:{port}/, WhatsApp {'on' if whatsapp else 'off'}", flush=True)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
        if whatsapp is not None:
            await whatsapp.close()
        await proxy.close()
        store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--proxy", default="http://127.0.0.1:7450", help="URL of intentd-proxy")
    parser.add_argument("--port", type=int, default=7470, help="on 127.0.0.1; 0: a free one")
    parser.add_argument("--state", type=Path, default=Path("qa.sqlite"), help="database file")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
