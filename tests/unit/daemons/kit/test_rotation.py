"""The steps of a rotation, as files: at each both sides have a key in common."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest

from intentd.core.errors import InputError
from intentd.core.flows.fin import FinSigner, FinVerifier
from intentd.core.flows.turn.wire import Run
from intentd.daemons.kit import keys
from intentd.daemons.kit.rotation import Step, next_step

RUNS = (Run(0, 1, 1),)


def test_a_fin_key_in_three_steps(tmp_path: Path) -> None:
    path = tmp_path / "fin.key"
    old = keys.new_fin_key()
    keys.write_fin_key(path, old)
    seen = [keys.read_fin_keys(path)]
    for step in (Step.ADDED, Step.SWITCHED, Step.DROPPED):
        assert next_step(path) is step
        assert path.stat().st_mode & 0o777 == 0o600
        seen.append(keys.read_fin_keys(path))
    new = seen[3][0]
    assert seen == [(old,), (old, new), (new, old), (new,)]
    # Whoever has taken a step and whoever has not yet accept each other.
    for before, after in itertools.pairwise(seen):
        assert before[0] in after
        assert after[0] in before
    assert next_step(path) is Step.ADDED


def test_a_verifier_follows_the_keys_and_forgets_nothing() -> None:
    old, new = bytes(32), bytes(range(32))
    signer, verifier = FinSigner.from_domain_key(old, "a", 1), FinVerifier(old)
    first = signer.sign(1, 1, RUNS)
    assert verifier.accept(first)
    verifier.set_domain_keys((old, new))
    assert verifier.accept(signer.sign(1, 1, RUNS))
    signer.set_domain_key(new)
    assert verifier.accept(signer.sign(1, 1, RUNS))
    assert verifier.accept(first) is None
    verifier.set_domain_keys((new,))
    assert verifier.accept(signer.sign(1, 1, RUNS))
    late = FinSigner.from_domain_key(old, "a", 1)
    assert verifier.accept(late.sign(1, 1, RUNS)) is None
    assert verifier.dropped == {"malformed": 0, "forged": 1, "replayed": 1, "late": 0}
    # No key at all is no key: an unkeyed MAC is forged.
    keyless = bytearray(signer.sign(1, 1, RUNS))

    keyless[-16:] = hashlib.blake2s(bytes(keyless[:-16]), digest_size=16).digest()
    verifier.set_domain_keys((new,))
    assert verifier.accept(bytes(keyless)) is None


def test_a_pair_in_three_steps_with_its_allow_list(tmp_path: Path) -> None:
    path, allow = tmp_path / "curve.key", tmp_path / "allow"
    old = keys.new_curve_keys()
    keys.write_curve_keys(path, old)
    other = keys.new_curve_keys().public
    allow.write_text(f"# members\n{other.hex()} proxy\n{old.public.hex()} agent@h1  # the first\n")

    assert next_step(path, [allow]) is Step.ADDED
    assert keys.read_curve_keys(path) == old
    first, new = keys.read_curve_publics(tmp_path / "curve.key.pub")
    assert first == old.public
    assert keys.read_allow_list(allow) == {
        other: "proxy", old.public: "agent@h1", new: "agent@h1",
    }  # fmt: skip

    assert next_step(path, [allow]) is Step.SWITCHED
    assert keys.read_curve_keys(path).public == new
    assert keys.read_curve_publics(tmp_path / "curve.key.pub") == (new, old.public)
    assert len(keys.read_allow_list(allow)) == 3

    assert next_step(path, [allow]) is Step.DROPPED
    assert keys.read_curve_publics(tmp_path / "curve.key.pub") == (new,)
    assert keys.read_allow_list(allow) == {other: "proxy", new: "agent@h1"}
    assert old.secret.hex() not in path.read_text()
    assert "# members" in allow.read_text()


def test_wrong_files_are_refused_and_stay(tmp_path: Path) -> None:
    path, allow = tmp_path / "curve.key", tmp_path / "allow"
    keys.write_curve_keys(path, keys.new_curve_keys())
    before = path.read_text()
    allow.write_text("# nobody\n")
    with pytest.raises(InputError, match="no line of this key"):
        next_step(path, [allow])
    assert path.read_text() == before
    public = tmp_path / "curve.key.pub"
    public.chmod(0o600)
    with pytest.raises(InputError, match="intentd-fin-key, or"):
        next_step(public)
    with pytest.raises(keys.KeyFileError, match="No such file"):
        next_step(tmp_path / "none")
