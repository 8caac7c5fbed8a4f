"""``sslmode=verify-full`` of a store's URL is honoured: right authority and address, or none."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.local_postgres import Postgres, why_not

from intentd.daemons.kit.postgres import Database
from intentd.daemons.kit.store import StoreError

pytestmark = pytest.mark.real

ADDRESS, ELSEWHERE = "127.0.93.1", "127.0.93.2"  # of the loopback net, nobody else's


def openssl(where: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=where, check=True, capture_output=True, timeout=60)


def authority(where: Path, name: str) -> None:
    openssl(
        where, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
        "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.pem", "-days", "2", "-subj",
        f"/CN={name}", "-addext", "basicConstraints=critical,CA:TRUE",
        "-addext", "keyUsage=critical,keyCertSign",
    )  # fmt: skip


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities, and a server's pair for ADDRESS, signed by the first."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    where = tmp_path_factory.mktemp("tls")
    for name in ("ours", "theirs"):
        authority(where, name)
    (where / "names").write_text(f"subjectAltName=IP:{ADDRESS}\n")
    openssl(
        where, "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
        "-nodes", "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=database",
    )  # fmt: skip
    openssl(
        where, "x509", "-req", "-in", "server.csr", "-CA", "ours.pem", "-CAkey", "ours.key",
        "-CAcreateserial", "-out", "server.pem", "-days", "2", "-extfile", "names",
    )  # fmt: skip
    return where


@pytest.fixture(scope="module")
def server(certificates: Path) -> Iterator[Postgres]:
    if reason := why_not():
        pytest.skip(reason)
    postgres = Postgres()
    try:
        postgres.stop()
        owner = postgres.data.stat()
        for name in ("server.key", "server.pem"):
            target = postgres.data / name
            shutil.copy(certificates / name, target)
            os.chown(target, owner.st_uid, owner.st_gid)
            target.chmod(0o600)
        with (postgres.data / "postgresql.conf").open("a") as config:
            config.write(
                f"listen_addresses = '{ADDRESS},{ELSEWHERE}'\nssl = on\n"
                "ssl_cert_file = 'server.pem'\nssl_key_file = 'server.key'\n"
            )
        try:
            postgres.start()
        except RuntimeError as error:
            if "could not bind" in str(error):
                pytest.skip("the port of PostgreSQL is taken")
            raise
        yield postgres
    finally:
        postgres.close()


async def ask(host: str, root: Path) -> str:
    """The protocol of the connection, as the server says."""
    url = f"postgresql://intentd@{host}/postgres?sslmode=verify-full&sslrootcert={root}"
    database = await Database.open(url, password="", connections=1, timeout_s=10.0, migrations=())

    try:
        (row,) = await database.read(
            "SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid() AND ssl"
        )
        return str(row["version"])
    finally:
        await database.close()


async def test_the_right_authority_and_address(server: Postgres, certificates: Path) -> None:
    assert (await ask(ADDRESS, certificates / "ours.pem")).startswith("TLSv1.")


@pytest.mark.parametrize(
    ("host", "root", "says"),
    [
        (ADDRESS, "theirs.pem", "certificate verify failed"),
        (ELSEWHERE, "ours.pem", "certificate"),
    ],
)
async def test_another_authority_or_address_is_refused(
    server: Postgres, certificates: Path, host: str, root: str, says: str
) -> None:
    with pytest.raises(StoreError, match=says):
        await ask(host, certificates / root)
