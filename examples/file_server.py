"""A file server whose answers take their turn: threads, blocking sockets, sendfile.

    python examples/file_server.py serve DIRECTORY [--bind 127.0.0.1:8000]
    python examples/file_server.py get 127.0.0.1:8000 NAME > copy

The server sends the data, so the server's host is where the link is shared and where the flow is
opened. A request is the file's name and a line end; the answer is its size as eight bytes, then
the file; the size 2^64 - 1 says that there is no such file. Without an agent on the host the same
program serves at once.
"""

from __future__ import annotations

import argparse
import os
import socketserver
import sys
from pathlib import Path
from typing import Any

from intentd.agent.client import flows

NO_FILE = 2**64 - 1
MAX_NAME = 1024


class Handler(socketserver.StreamRequestHandler):
    """One connection; any number of requests, one after the other."""

    def handle(self) -> None:
        while name := self.rfile.readline(MAX_NAME).rstrip(b"\n"):
            self.answer(name.decode("utf-8", "replace"))

    def answer(self, name: str) -> None:
        try:
            file = (Path(self.server.directory) / Path(name).name).open("rb")
        except OSError:
            self.connection.sendall(NO_FILE.to_bytes(8, "big"))
            return
        with file:
            size = os.fstat(file.fileno()).st_size
            # The turn is this flow's alone until the block ends, which waits until the bytes have
            # left this host.
            with flows.open(size + 8, sock=self.connection) as flow:
                flow.send(self.connection, size.to_bytes(8, "big"))
                flow.sendfile(self.connection, file)
        note = f"degraded ({flow.degraded})" if flow.degraded else "in turn"
        print(
            f"{name}: {size} bytes, class {flow.class_index}, waited {flow.waited_s * 1e3:.2f} ms, "
            f"{note}",
            file=sys.stderr,
        )


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: tuple[str, int], directory: str) -> None:
        super().__init__(address, Handler)
        self.directory = directory


def serve(arguments: argparse.Namespace) -> int:
    host, _, port = arguments.bind.rpartition(":")
    with Server((host, int(port)), arguments.directory) as server:
        print("listening on {}:{}".format(*server.server_address[:2]), flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


def get(arguments: argparse.Namespace) -> int:
    import socket

    host, _, port = arguments.server.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(arguments.name.encode() + b"\n")
        source: Any = connection.makefile("rb")
        left = int.from_bytes(source.read(8), "big")
        if left == NO_FILE:
            print(f"{arguments.name}: no such file", file=sys.stderr)
            return 1
        while left and (block := source.read(min(left, 1 << 16))):
            sys.stdout.buffer.write(block)
            left -= len(block)
    return 1 if left else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="a file server gated by intentd")
    commands = parser.add_subparsers(required=True)
    serving = commands.add_parser("serve")
    serving.add_argument("directory")
    serving.add_argument("--bind", default="127.0.0.1:8000")
    serving.set_defaults(run=serve)
    getting = commands.add_parser("get")
    getting.add_argument("server")
    getting.add_argument("name")
    getting.set_defaults(run=get)
    arguments = parser.parse_args()
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
