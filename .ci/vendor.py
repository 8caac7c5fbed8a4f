#!/usr/bin/env python3
"""Fetches what the console and its tests take from npm: exact versions, checked by their hash.

    .ci/vendor.py console|tests

Without npm the console serves its tables without charts; a message says so. With --required that
is an error.
"""

import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSOLE = ROOT / "controller/console/static/vendor"
TESTS = ROOT / "tests/real/console/vendor"
# group: (package, version, integrity as npm states it, {file of the package: where it goes})
WANTED = {
    "console": [
        (
            "uplot",
            "1.6.32",
            "sha512-KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXImkbLgkMy+jabjLgSLMasNuGGzQm/ep3tOkyTxpiQIw==",
            {
                "package/dist/uPlot.iife.min.js": CONSOLE / "uPlot.iife.min.js",
                "package/dist/uPlot.min.css": CONSOLE / "uPlot.min.css",
                "package/LICENSE": CONSOLE / "uPlot-LICENSE.txt",
            },
        )
    ],
    "tests": [
        (
            "axe-core",
            "4.14.1",
            "sha512-FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ==",
            {"package/axe.min.js": TESTS / "axe.min.js"},
        )
    ],
}


def fetch(name: str, version: str, integrity: str, files: dict[str, Path]) -> None:
    """Raises SystemExit with one line."""
    with tempfile.TemporaryDirectory() as where:
        packed = subprocess.run(
            ["npm", "pack", "--silent", "--ignore-scripts", "--fetch-retries=1",
             f"{name}@{version}"],
            cwd=where, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        archives = list(Path(where).glob("*.tgz"))
        if packed.returncode or len(archives) != 1:
            reason = packed.stderr.strip().splitlines()[-1:] or ["no archive"]
            raise SystemExit(f"vendor: {name} {version}: npm: {reason[0]}")
        data = archives[0].read_bytes()
        found = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
        if found != integrity:
            raise SystemExit(f"vendor: {name} {version}: got {found}, expected {integrity}")
        with tarfile.open(archives[0]) as archive:
            for member, target in files.items():
                content = archive.extractfile(member)
                assert content is not None
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())
    marker(files).write_text(integrity)
    print(f"vendor: {name} {version}", file=sys.stderr)


def marker(files: dict[str, Path]) -> Path:
    first = next(iter(files.values()))
    return first.with_name(f".{first.name}.integrity")


def present(integrity: str, files: dict[str, Path]) -> bool:
    kept = marker(files)
    return (
        all(path.exists() for path in files.values())
        and kept.exists()
        and kept.read_text() == integrity
    )


def main() -> None:
    required = "--required" in sys.argv
    for group in [word for word in sys.argv[1:] if not word.startswith("-")]:
        for name, version, integrity, files in WANTED[group]:
            if present(integrity, files):
                continue
            if shutil.which("npm") is None:
                text = f"vendor: npm is not installed: {name} is left out"
                if required:
                    raise SystemExit(text)
                print(text, file=sys.stderr)
                continue
            try:
                fetch(name, version, integrity, files)
            except SystemExit as error:
                if required:
                    raise
                print(error, file=sys.stderr)


if __name__ == "__main__":
    main()
