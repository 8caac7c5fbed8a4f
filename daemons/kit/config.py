"""Configuration: one TOML file a daemon, into frozen pydantic models, refused whole when wrong.

Every field has a default and a description; ``describe`` lists them and the table in
docs/operations.md is generated from it. ``INTENTD_<ROLE>__SECTION__KEY=value`` overrides the file.
"""

from __future__ import annotations

import difflib
import os
import re
import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, TypeVar, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from intentd.core.errors import ConfigError, InputError
from intentd.core.units import parse_duration_s, parse_rate_bps, parse_size_bytes

STATUS_PORTS: Final = {
    "controller": 7401,
    "sequencer": 7411,
    "agent": 7421,
    "gpu": 7441,
    "proxy": 7451,
}
CONTROLLER_ENDPOINT: Final = "tcp://127.0.0.1:7400"
ZMQ_ADDRESS: Final = r"^(tcp|ipc)://.+"
ZMQ_ADDRESS_OR_NONE: Final = r"^((tcp|ipc)://.+)?$"
MAX_FILE_BYTES: Final = 8 << 20
_TOKEN: Final = re.compile(r"((read|operate|admin):)?[0-9a-f]{64}\Z")
_ORIGIN: Final = r"^(https?://[A-Za-z0-9.:\[\]-]+)?$"
_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
MAX_ENDPOINTS: Final = 8

# An empty field name: the loader puts the path in front.
Duration = Annotated[float, BeforeValidator(lambda text: parse_duration_s(text, ""))]
"""Seconds; the file may say ``"250ms"``."""
Size = Annotated[int, BeforeValidator(lambda text: parse_size_bytes(text, ""))]
"""Bytes; the file may say ``"64KiB"``."""
Rate = Annotated[float, BeforeValidator(lambda text: parse_rate_bps(text, ""))]
"""Bits per second; the file may say ``"1Gbit"``."""


def _joined(value: object) -> object:
    """A list of addresses as one text with commas, and no blanks in it."""
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        value = ",".join(value)
    return re.sub(r"\s*,\s*", ",", value.strip()) if isinstance(value, str) else value


Endpoints = Annotated[str, BeforeValidator(_joined)]
"""Addresses of one thing, separated by commas; the file may give a list."""


class InvalidConfigError(ConfigError):
    """All that is wrong with one configuration; ``errors`` lists them, the text has one a line."""

    def __init__(self, errors: list[ConfigError]) -> None:
        self.errors = errors
        first = errors[0]
        super().__init__(first.field, first.value, first.expected)
        self.args = ("\n".join(str(error) for error in errors),)


class Section(BaseModel):
    """A table of the configuration file: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def default_state_dir() -> Path:
    """systemd's $STATE_DIRECTORY, else /var/lib/intentd for root, else the user's XDG directory."""
    given = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    if given:
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib/intentd")
    home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(home) / "intentd"


def default_run_dir() -> Path:
    """systemd's $RUNTIME_DIRECTORY, else /run/intentd for root, else the user's own directory."""
    given = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    if given:
        return Path(given)
    if os.geteuid() == 0:
        return Path("/run/intentd")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime) / "intentd"
    return Path(f"/tmp/intentd-{os.geteuid()}")  # noqa: S108  mode 0700, owner checked on use


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or bool(re.match(r"127(\.[0-9]{1,3}){3}\Z", host))


def check_link_security(endpoint: str, *, keyed: bool, where: str) -> None:
    """Refuse to listen or to connect beyond this machine without keys. Raises ConfigError."""
    if endpoint.startswith("tcp://") and not keyed:
        host, _, _ = endpoint.removeprefix("tcp://").rpartition(":")
        if not is_loopback(host.removeprefix("[").removesuffix("]")):
            raise ConfigError(where, endpoint, "a loopback address, or key_file set (CURVE)")


class LogSection(Section):
    """How the daemon writes its log (standard error)."""

    level: str = Field(
        default="info",
        description="Least severity written: debug, info, warning or error.",
        pattern="^(debug|info|warning|error)$",
    )
    format: str = Field(
        default="text",
        description="text (key=value) or json (one object a line).",
        pattern="^(text|json)$",
    )


class StatusSection(Section):
    """The HTTP endpoint with /livez, /readyz, /status and /metrics."""

    enabled: bool = Field(default=True, description="Serve the endpoint at all.")
    bind: str = Field(
        default="",
        description="address:port. Empty: 127.0.0.1 and the role's port (controller 7401, "
        "sequencer 7411, agent 7421, gpu 7441, proxy 7451). Port 0 takes a free one.",
    )
    tokens: tuple[str, ...] = Field(
        default=(),
        description="SHA-256 (hex) of each accepted bearer token, with its role in front "
        "(read:HASH, operate:HASH; without one: admin), beside those of intentctl tokens. One is "
        "needed to change anything by HTTP, and off loopback to read.",
    )
    tls_cert_file: str = Field(
        default="", description="Certificate chain (PEM) to serve HTTPS with. Empty: HTTP."
    )
    tls_key_file: str = Field(default="", description="Its private key (PEM).")
    origin: str = Field(
        default="",
        description="Where browsers find this endpoint if a reverse proxy stands before it, such "
        "as https://intentd.example: accepted as Host and Origin; with https cookies are Secure.",
        pattern=_ORIGIN,
    )

    @model_validator(mode="after")
    def _check(self) -> StatusSection:
        for index, token in enumerate(self.tokens):
            if not _TOKEN.match(token):
                raise ConfigError(
                    f"tokens[{index}]",
                    "(hidden)",
                    "the SHA-256 of a token: 64 lower-case hex digits, or ROLE:HASH",
                )
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            raise ConfigError(
                "tls_key_file", self.tls_key_file, "tls_cert_file and tls_key_file together"
            )
        if self.bind:
            host, port = split_address(self.bind, "bind")
            if port >= 0 and not is_loopback(host) and not self.tokens:
                raise ConfigError("bind", self.bind, "a loopback address, or status.tokens set")
        return self


class AdminSection(Section):
    """The Unix socket intentctl talks to."""

    path: str = Field(default="", description="Socket path. Empty: <run_dir>/<role>.admin.sock.")
    group: str = Field(
        default="",
        description="Group whose members may use it, besides root and the daemon's own user.",
    )


class ControllerSection(Section):
    """The link to the controller."""

    enabled: bool = Field(default=True, description="Connect to a controller at all.")
    endpoint: Endpoints = Field(
        default=CONTROLLER_ENDPOINT,
        description="ZeroMQ address of the controller's hub; of a pair all addresses, as a list or "
        "with commas.",
    )
    key_file: str = Field(
        default="",
        description="This member's CURVE key pair (intentctl keys new). Empty: no encryption.",
    )
    server_key_file: str = Field(
        default="", description="The controller's public CURVE key; needed with key_file."
    )
    report_interval_s: Duration = Field(
        default=2.0,
        description="Seconds between reports until the controller names its own interval.",
        gt=0,
        le=3600,
    )
    backoff_min_s: Duration = Field(
        default=0.2, description="First wait before reconnecting.", gt=0
    )
    backoff_max_s: Duration = Field(
        default=10.0, description="Longest wait before reconnecting.", gt=0
    )

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(self.endpoint.split(","))

    @model_validator(mode="after")
    def _check(self) -> ControllerSection:
        for endpoint in self.endpoints:
            if not re.match(ZMQ_ADDRESS, endpoint):
                raise ConfigError("endpoint", endpoint, _form(ZMQ_ADDRESS))
        if not len(set(self.endpoints)) == len(self.endpoints) <= MAX_ENDPOINTS:
            raise ConfigError(
                "endpoint", self.endpoint, f"at most {MAX_ENDPOINTS} addresses, each once"
            )
        if bool(self.key_file) != bool(self.server_key_file):
            raise ConfigError(
                "server_key_file", self.server_key_file, "key_file and server_key_file together"
            )
        for endpoint in self.endpoints:
            check_link_security(endpoint, keyed=bool(self.key_file), where="endpoint")
        if self.backoff_max_s < self.backoff_min_s:
            raise ConfigError("backoff_max_s", self.backoff_max_s, "at least backoff_min_s")
        return self


class HubSection(Section):
    """Where the controller listens for members."""

    bind: str = Field(
        default=CONTROLLER_ENDPOINT,
        description="ZeroMQ address; off loopback only with key_file.",
        pattern=ZMQ_ADDRESS,
    )
    key_file: str = Field(
        default="", description="The controller's CURVE key pair. Empty: no encryption."
    )
    allow_file: str = Field(
        default="",
        description="Public keys of the members let in, one a line: KEY [ROLE[@NAME]]. "
        "Needed with key_file; read again on reload.",
    )
    report_interval_s: Duration = Field(
        default=2.0, description="How often members are told to report.", gt=0, le=3600
    )
    expiry_intervals: float = Field(
        default=3.0,
        description="Report intervals of silence after which a member counts as gone.",
        ge=2,
    )
    max_members: int = Field(
        default=1024, description="Members beyond this number are refused.", ge=1
    )

    @model_validator(mode="after")
    def _check(self) -> HubSection:
        if bool(self.key_file) != bool(self.allow_file):
            raise ConfigError("allow_file", self.allow_file, "key_file and allow_file together")
        check_link_security(self.bind, keyed=bool(self.key_file), where="bind")
        return self


class ReloadSection(Section):
    """How a reloaded configuration proves itself."""

    window_s: Duration = Field(
        default=30.0,
        description="A daemon that was ready, and within this time of a reload is not any more, "
        "returns to the last good configuration. 0: never.",
        ge=0,
        le=600,
    )
    grace_s: Duration = Field(
        default=2.0,
        description="How long it may be unready meanwhile before that counts.",
        ge=0,
        le=600,
    )


class CommonConfig(Section):
    """What every daemon's file may hold; a role's model adds its own fields and sections."""

    role: ClassVar[str] = "daemon"

    name: str = Field(
        default="",
        description="This member's name among its role. Empty: the host name.",
        max_length=128,
    )
    host: str = Field(
        default_factory=lambda: socket.gethostname() or "localhost",
        description="Host name reported to the controller. Default: the machine's.",
        min_length=1,
        max_length=253,
    )
    state_dir: Path = Field(
        default_factory=default_state_dir,
        description="What must survive a restart. Default: $STATE_DIRECTORY, else "
        "/var/lib/intentd (root), else ~/.local/state/intentd.",
    )
    run_dir: Path = Field(
        default_factory=default_run_dir,
        description="Sockets and the lock. Default: $RUNTIME_DIRECTORY, else /run/intentd (root), "
        "else $XDG_RUNTIME_DIR/intentd or a private directory under /tmp.",
    )
    drain_timeout_s: Duration = Field(
        default=10.0, description="Longest wait for work to end after SIGTERM.", ge=0, le=600
    )
    log: LogSection = Field(default=LogSection(), description="Log output.")
    status: StatusSection = Field(default=StatusSection(), description="HTTP status endpoint.")
    admin: AdminSection = Field(default=AdminSection(), description="Admin socket.")
    reload: ReloadSection = Field(default=ReloadSection(), description="Reload.")

    @model_validator(mode="before")
    @classmethod
    def _fill_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("name", "") == "":
            return {**data, "name": data.get("host") or socket.gethostname() or "localhost"}
        return data

    @property
    def status_bind(self) -> str:
        return self.status.bind or f"127.0.0.1:{STATUS_PORTS.get(self.role, 0)}"

    @property
    def admin_path(self) -> Path:
        return Path(self.admin.path) if self.admin.path else admin_path(self.role, self.run_dir)


class DaemonConfig(CommonConfig):
    """A member: everything common, and the link to the controller."""

    controller: ControllerSection = Field(
        default=ControllerSection(), description="Link to the controller."
    )


def admin_path(role: str, run_dir: Path | None = None) -> Path:
    return (run_dir or default_run_dir()) / f"{role}.admin.sock"


def split_address(text: str, where: str) -> tuple[str, int]:
    """``"127.0.0.1:80"`` or ``"[::1]:80"`` as host and port. Raises ConfigError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(where, text, "address:port, such as 127.0.0.1:7401")
    return host, int(port)


def check_database(url: str, password_env: str) -> None:
    """A database's address in a section. Raises ConfigError, without what may be secret."""
    if url:
        parts = urlsplit(url)
        if parts.scheme not in ("postgresql", "postgres"):
            raise ConfigError("url", "(hidden)", "postgresql://USER@HOST/DATABASE")
        if parts.password or "password=" in parts.query:
            raise ConfigError("url", "(hidden)", "no password: it goes into password_env")
    if password_env and not _ENV_NAME.match(password_env):
        raise ConfigError("password_env", "(hidden)", "the NAME of an environment variable")


def database_password(password_env: str) -> str:
    """What the named variable holds; empty without a name. Raises ConfigError if it is not set."""
    password = os.environ.get(password_env, "") if password_env else ""
    if password_env and not password:
        raise ConfigError(
            "store.password_env", password_env, "an environment variable that holds the password"
        )
    return password


M = TypeVar("M", bound=CommonConfig)


def default_config_path(role: str) -> Path:
    return Path("/etc/intentd") / f"{role}.toml"


def load_config(model: type[M], path: Path | None, environ: Mapping[str, str]) -> M:
    """The configuration of one daemon. path None: defaults and environment alone.

    Raises InvalidConfigError with every error, each with its path such as ``classes[2].weight``.
    """
    return parse_config(model, read_source(path), environ)


def read_source(path: Path | None) -> bytes:
    """A configuration file's bytes, bounded. Raises InvalidConfigError."""
    if path is None:
        return b""
    try:
        with path.open("rb") as file:
            source = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidConfigError([ConfigError("file", error.strerror, "a readable file")]) from None
    if len(source) > MAX_FILE_BYTES:
        expected = f"at most {MAX_FILE_BYTES} bytes"
        raise InvalidConfigError([ConfigError("file", "more", expected)])
    return source


def parse_table(source: bytes) -> dict[str, Any]:
    """The TOML table of a file's bytes. Raises InvalidConfigError."""
    try:
        return tomllib.loads(source.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # TOML's and UTF-8's errors are ValueErrors
        raise InvalidConfigError([ConfigError("file", str(error), "a TOML file")]) from None


def parse_config(model: type[M], source: bytes, environ: Mapping[str, str]) -> M:
    """As load_config, of the file's bytes."""
    table = parse_table(source)
    _override(table, model, environ)
    return validate(model, table)


S = TypeVar("S", bound=BaseModel)


def validate(model: type[S], table: Mapping[str, Any]) -> S:
    """The model of a plain table. Raises InvalidConfigError."""
    try:
        return model.model_validate(dict(table))
    except ValidationError as error:
        raise InvalidConfigError([_convert(model, item) for item in error.errors()]) from None


def _convert(model: type[BaseModel], item: Any) -> ConfigError:
    """One pydantic error as ours: path, value, expectation."""
    where = _path(item["loc"])
    value = item.get("input")
    kind = str(item["type"])
    cause = (item.get("ctx") or {}).get("error")
    if isinstance(cause, InputError):
        inner = cause.field
        joined = (
            f"{where}.{inner}" if where and inner and not inner.startswith("[") else where + inner
        )
        return ConfigError(joined, cause.value, cause.expected)
    if kind == "extra_forbidden":
        known = _known_names(model, item["loc"][:-1])
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = (
            f"a known field: did you mean {close[0]}?"
            if close
            else (f"one of {', '.join(sorted(known))}" if known else "no such field")
        )
        return ConfigError(where, value, hint)
    if kind == "missing":
        return ConfigError(where, None, "a value (it is required)")
    if kind == "string_pattern_mismatch":
        return ConfigError(where, value, _form(item["ctx"]["pattern"]))
    text = str(item["msg"])
    for prefix in ("Input should be ", "Value error, "):
        text = text.removeprefix(prefix)
    return ConfigError(where, value, text)


def _form(pattern: str) -> str:
    """A field's pattern in words, as far as it has any."""
    words = re.fullmatch(r"\^\(([a-z_|]+)\)\$", pattern)
    if words is not None:
        return f"one of {', '.join(words[1].split('|'))}"
    if pattern in (ZMQ_ADDRESS, ZMQ_ADDRESS_OR_NONE):
        return "tcp://HOST:PORT or ipc://PATH"
    return f"text of the form {pattern}"


def _path(loc: tuple[Any, ...]) -> str:
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else str(part)
    return text


def _known_names(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """Field names of the (nested) model at a location, for near-match suggestions."""
    current: type[BaseModel] | None = model
    is_key = False  # the part names an entry of a map, not a field
    for part in loc:
        if isinstance(part, int) or is_key:
            is_key = False
            continue
        field = current.model_fields.get(str(part)) if current is not None else None
        current = None if field is None else nested_model(field.annotation)
        is_key = field is not None and get_origin(field.annotation) is dict
    return [] if current is None else list(current.model_fields)


def nested_model(annotation: Any) -> type[BaseModel] | None:
    """The model inside ``Model``, ``tuple[Model, ...]``, ``dict[str, Model]``, ``Model | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        found = nested_model(inner)
        if found is not None:
            return found
    return None


def _override(table: dict[str, Any], model: type[CommonConfig], environ: Mapping[str, str]) -> None:
    """Lay ``INTENTD_<ROLE>__A__B=value`` over the table; values are TOML, else text."""
    prefix = f"INTENTD_{model.role.upper()}__"
    for name in sorted(environ):
        if not name.startswith(prefix):
            continue
        parts = [part.lower() for part in name.removeprefix(prefix).split("__")]
        if not all(parts):
            raise InvalidConfigError(
                [ConfigError(name, environ[name], f"{prefix}SECTION__KEY=value")]
            )
        target = table
        for part in parts[:-1]:
            inner = target.setdefault(part, {})
            if not isinstance(inner, dict):
                raise InvalidConfigError(
                    [ConfigError(name, environ[name], f"{part} to be a table")]
                )
            target = inner
        target[parts[-1]] = _env_value(environ[name], _annotation_at(model, parts))


def _annotation_at(model: type[BaseModel], parts: list[str]) -> Any:
    current: type[BaseModel] | None = model
    for part in parts[:-1]:
        field = current.model_fields.get(part) if current is not None else None
        current = None if field is None else nested_model(field.annotation)
    last = current.model_fields.get(parts[-1]) if current is not None else None
    return None if last is None else last.annotation


def _env_value(text: str, annotation: Any) -> Any:
    """Text where the field is text or a path; elsewhere a TOML value, and text if it is none."""
    if annotation in (str, Path):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text
