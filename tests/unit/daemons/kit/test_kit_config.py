"""Configuration: defaults, overrides, and every error with its path."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from intentd.core.errors import ConfigError, PolicyError
from intentd.daemons.kit.config import (
    CommonConfig,
    DaemonConfig,
    Duration,
    HubSection,
    InvalidConfigError,
    Rate,
    Section,
    Size,
    default_run_dir,
    default_state_dir,
    is_loopback,
    load_config,
    split_address,
)
from intentd.daemons.kit.settings import describe, markdown_table, toml_value


class Lane(Section):
    """One of several."""

    weight: float = Field(default=1.0, description="Share.", gt=0, le=1)
    name: str = Field(default="", description="Name.")

    @model_validator(mode="after")
    def _check(self) -> Lane:
        if self.name == "bad":
            raise PolicyError("name", self.name, "another name")
        return self


class Net(Section):
    """A section of its own."""

    rate: Rate = Field(default="1Gbit", description="Capacity.")  # type: ignore[assignment]
    buffer: Size = Field(default=65536, description="Bytes.")
    wait: Duration = Field(default=0.25, description="Wait.")
    lanes: tuple[Lane, ...] = Field(default=(), description="Lanes.")
    by_name: dict[str, Lane] = Field(default={}, description="Lanes by name.")


class Toy(DaemonConfig):
    """A role with a section of its own."""

    role: ClassVar[str] = "toy"
    net: Net = Field(default=Net(), description="Network.")
    modes: tuple[str, ...] = Field(default=("a",), description="Modes.")
    extra: int | None = Field(default=None, description="Maybe a number.")


def load(text: str = "", environ: dict[str, str] | None = None, tmp: Path | None = None) -> Toy:
    path = None
    if tmp is not None:
        path = tmp / "toy.toml"
        path.write_text(text)
    return load_config(Toy, path, environ or {})


def errors(text: str, tmp: Path, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(InvalidConfigError) as caught:
        load(text, environ, tmp)
    return [str(error) for error in caught.value.errors]


def test_every_field_has_a_default_and_a_description() -> None:
    toy = load()
    assert toy.name == toy.host
    assert toy.net.rate == 1e9
    assert toy.admin_path == toy.run_dir / "toy.admin.sock"
    assert all(row.description and row.default != "required" for row in describe(Toy))


def test_units_and_tables_are_read(tmp_path: Path) -> None:
    toy = load(
        'name = "n"\n[net]\nrate = "10Gbit"\nbuffer = "64KiB"\nwait = "250ms"\n'
        "[[net.lanes]]\nweight = 0.5\n[net.by_name.x]\nweight = 0.25\n",
        tmp=tmp_path,
    )
    assert (toy.net.rate, toy.net.buffer, toy.net.wait) == (1e10, 65536, 0.25)
    assert toy.net.lanes[0].weight == 0.5
    assert toy.net.by_name["x"].weight == 0.25


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[net.lanes]]\n[[net.lanes]]\nweight = 2", "net.lanes[1].weight: got 2, expected"),
        ("[net]\nrat = 1", "net.rat: got 1, expected a known field: did you mean rate?"),
        ("[net]\nzzzz = 1", "net.zzzz: got 1, expected one of "),
        (
            "[[net.lanes]]\nwieght = 1",
            "net.lanes[0].wieght: got 1, expected a known field: did you",
        ),
        ("[net.by_name.x]\nwieght = 1", "net.by_name.x.wieght: got 1, expected a known field: did"),
        ('[net]\nrate = "fast"', "net.rate: got 'fast', expected a number >= 0 or text such as"),
        ('[[net.lanes]]\nname = "bad"', "net.lanes[0].name: got 'bad', expected another name"),
        ("nett = 3", "nett: got 3, expected a known field: did you mean net?"),
        ('[status]\nbind = "7401"', "status.bind: got '7401', expected address:port"),
        ('[status]\nbind = "0.0.0.0:1"', "status.bind: got '0.0.0.0:1', expected a loopback"),
        ('[status]\ntokens = ["secret"]', "status.tokens[0]: got '(hidden)', expected the SHA-256"),
        ('[controller]\nkey_file = "k"', "controller.server_key_file: got '', expected key_file"),
        ('[log]\nlevel = "loud"', "log.level: got 'loud', expected one of debug, info"),
        (
            '[controller]\nendpoint = "http://x"',
            "controller.endpoint: got 'http://x', expected tcp://HOST:PORT or ipc://PATH",
        ),
        ("name = [", "expected a TOML file"),
    ],
)
def test_an_error_names_path_value_and_expectation(
    text: str, expected: str, tmp_path: Path
) -> None:
    assert any(expected in error for error in errors(text, tmp_path)), errors(text, tmp_path)


def test_all_errors_are_listed_at_once(tmp_path: Path) -> None:
    assert len(errors("a = 1\nb = 2\n[net]\nbuffer = -1.5\nwait = true", tmp_path)) >= 3


def test_a_missing_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="No such file"):
        load_config(Toy, tmp_path / "none.toml", {})


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    toy = load(
        "[net]\nbuffer = 1\n",
        {
            "INTENTD_TOY__NET__BUFFER": "2",
            "INTENTD_TOY__NAME": "007",
            "INTENTD_TOY__MODES": '["x", "y"]',
            "INTENTD_TOY__EXTRA": "5",
            "INTENTD_TOY__STATE_DIR": "/x",
            "INTENTD_OTHER__NAME": "no",
        },
        tmp_path,
    )
    assert (toy.net.buffer, toy.name, toy.modes, toy.extra) == (2, "007", ("x", "y"), 5)
    assert toy.state_dir == Path("/x")
    assert "did you mean net" in errors("", tmp_path, {"INTENTD_TOY__NETT__X": "1"})[0]
    assert "SECTION__KEY" in errors("", tmp_path, {"INTENTD_TOY____X": "1"})[0]
    assert "to be a table" in errors("name='a'", tmp_path, {"INTENTD_TOY__NAME__X": "1"})[0]


@given(
    st.dictionaries(
        st.text("abcdefghijklmnopqrstuvwxyz_[]. ", min_size=1),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=8,
        ),
        max_size=4,
    )
)
def test_any_table_is_accepted_or_refused_with_paths(table: dict[str, object]) -> None:
    from intentd.daemons.kit.config import validate

    with contextlib.suppress(InvalidConfigError):
        validate(Toy, {**table, "net": table})


def test_tokens_open_the_endpoint_off_loopback(tmp_path: Path) -> None:
    token = hashlib.sha256(b"t").hexdigest()
    toy = load(f'[status]\nbind = "0.0.0.0:0"\ntokens = ["{token}"]', tmp=tmp_path)
    assert toy.status_bind == "0.0.0.0:0"


def test_a_hub_off_loopback_needs_keys() -> None:
    with pytest.raises(ValueError, match="loopback"):
        HubSection(bind="tcp://0.0.0.0:7400")
    with pytest.raises(ValueError, match="together"):
        HubSection(key_file="k")
    HubSection(bind="tcp://0.0.0.0:7400", key_file="k", allow_file="a")
    HubSection(bind="ipc:///run/x")


def test_directories_follow_systemd_root_and_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/a:/var/lib/b")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/a")
    assert (default_state_dir(), default_run_dir()) == (Path("/var/lib/a"), Path("/run/a"))
    monkeypatch.delenv("STATE_DIRECTORY")
    monkeypatch.delenv("RUNTIME_DIRECTORY")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert (default_state_dir(), default_run_dir()) == (
        Path("/var/lib/intentd"),
        Path("/run/intentd"),
    )
    monkeypatch.setattr("os.geteuid", lambda: 1234)
    monkeypatch.setenv("XDG_STATE_HOME", "/s")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/r")
    assert (default_state_dir(), default_run_dir()) == (Path("/s/intentd"), Path("/r/intentd"))
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_run_dir() == Path("/tmp/intentd-1234")


def test_addresses() -> None:
    assert split_address("[::1]:80", "x") == ("::1", 80)
    assert is_loopback("127.0.0.9")
    assert not is_loopback("127.example.org")
    for text in ("a", "a:", ":1", "a:70000", "a:-1"):
        with pytest.raises(ConfigError):
            split_address(text, "x")


def test_the_table_of_settings() -> None:
    table = markdown_table(Toy)
    assert "| `net.lanes[].weight` | number | `1` | Share. |" in table
    assert "| `net.by_name.NAME.name` |" in table
    assert "| `extra` | integer | `(none)` |" in table
    assert toml_value({"a": (1, 2.5, True, "x")}) == '{a = [1, 2.5, true, "x"]}'


def test_a_plain_common_config_has_no_controller() -> None:
    assert "controller" not in CommonConfig.model_fields
