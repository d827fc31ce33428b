"""Keys: their file, what finds and ends them, and what they allow."""

from __future__ import annotations

import hmac
import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastserve import cli
from fastserve.access.grant import Gate, shown_key
from fastserve.access.key import Key, id_of, new_key
from fastserve.access.keyring import CHECK_SECONDS, Keyring
from fastserve.access.keys_file import Keys, KeysFileError, Tenant, edit_keys, read_keys
from fastserve.config import TenantQuota
from fastserve.errors import ErrorCode, RequestError
from fastserve.types import OutputOptions, Request, SamplingParams


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def a_file(path: Path, *keys: Key, **tenants: Tenant) -> Path:
    file = path / "keys.json"
    with edit_keys(file) as box:
        box[0] = Keys(tenants=tenants, keys=keys)
    return file


def a_request(**fields: Any) -> Request:
    values: dict[str, Any] = {"priority": 0, "tenant": "", "arrival": 0.0, "deadline": None}
    return Request(
        uid="u",
        request_id="r",
        prompt="p",
        prompt_token_ids=[1],
        sampling=SamplingParams(),
        output=OutputOptions(),
        **(values | fields),
    )


def refusal(what: Callable[[], Any]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        what()
    return caught.value


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_key_is_known_by_itself_alone(tmp_path: Path) -> None:
    (shown, key), (other, other_key) = new_key("a"), new_key("b")
    keyring = Keyring(a_file(tmp_path, key, other_key))
    assert keyring.find(shown) == key
    assert keyring.find(other) == other_key
    swapped = f"fsk_{key.id}_{other.rsplit('_', 1)[1]}" if "_" not in other[17:] else shown + "x"
    for wrong in (
        swapped,
        shown[:-1],
        shown + "A",
        shown.upper(),
        key.id,
        key.sha256,
        "",
        "\ud800",
        "é" * 60,
    ):
        assert keyring.find(wrong) is None


def test_whatever_is_shown_is_compared_once_in_constant_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, key = new_key("a")
    keyring = Keyring(a_file(tmp_path, key))
    lengths: list[tuple[int, int]] = []

    def compare(first: str, second: str) -> bool:
        lengths.append((len(first), len(second)))
        return False

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for each in (shown, new_key("b")[0], "no key", ""):
        assert keyring.find(each) is None
    assert lengths == [(64, 64)] * 4


def test_the_file_holds_no_key_and_is_its_owners(tmp_path: Path) -> None:
    shown, key = new_key("a")
    before = os.umask(0)
    try:
        file = a_file(tmp_path, key)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert shown.rpartition("_")[2] not in file.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keys.json", "keys.json.lock"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    file = a_file(tmp_path)
    file.chmod(mode)
    with pytest.raises(KeysFileError, match=f"its mode is {mode:o}; allowed: 600"):
        read_keys(file)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "truncated"),
        ('{"key": []}', "unknown field `key`"),
        ('{"keys": [{"id": "1"}]}', "missing required field `sha256`"),
        ('{"tenants": {"a": {"quota": {}}}}', "at least one of requests_per_second"),
        ('{"tenants": {"": {}}}', "length"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "keys.json"
    file.touch(mode=0o600)
    file.write_text(content)
    with pytest.raises(KeysFileError, match=sentence):
        Keyring(file)


def test_a_revoked_key_stops_when_the_file_is_looked_at_again(tmp_path: Path, clock: Clock) -> None:
    assert CHECK_SECONDS < 5
    shown, key = new_key("a")
    file = a_file(tmp_path, key)
    keyring = Keyring(file, clock)
    with edit_keys(file) as box:
        box[0] = box[0].revoke(key.id, "now")
    clock.now += CHECK_SECONDS
    assert keyring.find(shown) is None


def test_a_new_key_and_a_new_quota_hold_without_a_restart(tmp_path: Path, clock: Clock) -> None:
    file = a_file(tmp_path)
    keyring = Keyring(file, clock)
    assert not keyring.refresh()
    shown, key = new_key("a")
    with edit_keys(file) as box:
        box[0] = box[0].with_key(key, Tenant(quota=TenantQuota(tokens_in_flight=9)))
    assert keyring.find(shown) is None
    clock.now += CHECK_SECONDS
    assert keyring.refresh()
    assert keyring.find(shown) == key
    assert keyring.quotas == {"a": TenantQuota(tokens_in_flight=9)}


@pytest.mark.parametrize("spoil", ["remove", "break"])
def test_nobody_is_let_in_while_the_file_cannot_be_read(tmp_path: Path, clock: Clock, spoil: str) -> None:
    shown, key = new_key("a")
    file = a_file(tmp_path, key)
    keyring = Keyring(file, clock)
    if spoil == "remove":
        file.unlink()
    else:
        file.write_text("{")
    clock.now += CHECK_SECONDS
    assert refusal(lambda: keyring.find(shown)).code is ErrorCode.UNAVAILABLE
    a_file(tmp_path, key) if spoil == "remove" else file.write_bytes(
        json.dumps(
            {"keys": [{"id": key.id, "sha256": key.sha256, "tenant": "a", "created": "then"}]}
        ).encode()
    )
    clock.now += CHECK_SECONDS
    assert keyring.find(shown) is not None


def test_two_who_add_keys_at_once_lose_none(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"

    def add() -> None:
        for _ in range(5):
            with edit_keys(file) as box:
                box[0] = box[0].with_key(new_key("a")[1])

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_keys(file).keys) == 20


# --- what comes with a request


@pytest.mark.parametrize(
    ("parameters", "came"),
    [
        ([], "no key"),
        ([("temperature", 1)], "no key"),
        ([("authorization", "Bearer k"), ("Authorization", "Bearer k")], "more than one key"),
        ([("authorization", "Bearer k"), ("authorization", "Bearer k")], "more than one key"),
        ([("authorization", "Basic k")], "something other"),
        ([("authorization", 7)], "something other"),
        ([("authorization", "secret-value")], "something other"),
    ],
)
def test_what_shows_no_key_is_refused_without_being_quoted(
    parameters: list[tuple[str, Any]], came: str
) -> None:
    error = refusal(lambda: shown_key(parameters))
    assert error.code is ErrorCode.UNAUTHENTICATED
    assert came in str(error)
    assert "secret-value" not in str(error)


@pytest.mark.parametrize("name", ["authorization", "Authorization", "AUTHORIZATION"])
def test_the_header_is_known_in_any_case(name: str) -> None:
    assert shown_key([("n", 1), (name, "bearer  k ")]) == "k"


def test_a_tenant_comes_from_the_key(tmp_path: Path) -> None:
    shown, key = new_key("paying")
    gate = Gate(Keyring(a_file(tmp_path, key, paying=Tenant(cache_salt="s"))), "fastserve")
    grant = gate.open([("authorization", f"Bearer {shown}")])
    request = grant.apply(a_request(priority=3))
    assert (request.tenant, request.priority, request.cache_salt, request.key_id) == (
        "paying",
        3,
        "s",
        key.id,
    )
    assert grant.apply(a_request(tenant="paying")).tenant == "paying"
    error = refusal(lambda: grant.apply(a_request(tenant="free")))
    assert (error.code, str(error)) == (
        ErrorCode.PERMISSION_DENIED,
        "`tenant`: got 'free'; allowed: none, or 'paying', to whom the key belongs",
    )


def test_a_priority_beyond_the_keys_range_is_refused_by_name(tmp_path: Path) -> None:
    shown, key = new_key("a", (-5, -1))
    grant = Gate(Keyring(a_file(tmp_path, key)), "m").open([("authorization", f"Bearer {shown}")])
    assert grant.apply(a_request(priority=0)).priority == -1
    assert grant.apply(a_request(priority=-5)).priority == -5
    for priority in (-6, 1):
        error = refusal(lambda priority=priority: grant.apply(a_request(priority=priority)))  # type: ignore[misc]
        assert error.code is ErrorCode.PERMISSION_DENIED
        assert str(error) == f"`priority`: got {priority}; allowed: -5 to -1, the range of the key"


def test_a_key_is_for_its_models(tmp_path: Path) -> None:
    shown, key = new_key("a", models=("embed",))
    keyring = Keyring(a_file(tmp_path, key))
    pairs = [("authorization", f"Bearer {shown}")]
    assert Gate(keyring, "embed").open(pairs).tenant == "a"
    error = refusal(lambda: Gate(keyring, "fastserve").open(pairs))
    assert error.code is ErrorCode.PERMISSION_DENIED
    assert "`model`: got 'fastserve'; allowed: embed" in str(error)


# --- the command


def test_the_command_adds_lists_and_revokes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = f"--keys-file={tmp_path / 'keys.json'}"
    add = ["keys", "add", file, "--tenant", "paying"]
    assert (
        cli.main([*add, "--priority-range=-1,5", "--models", "fastserve,embed", "--tokens-in-flight", "9"])
        == 0
    )
    shown = capsys.readouterr().out.strip()
    assert cli.main([*add, "--own-prefix-cache"]) == 0
    capsys.readouterr()
    keyring = Keyring(tmp_path / "keys.json")
    key = keyring.find(shown)
    assert key is not None
    assert (key.priority_range, key.models) == ((-1, 5), ("fastserve", "embed"))
    assert keyring.quotas == {"paying": TenantQuota(tokens_in_flight=9)}
    assert keyring.tenant("paying").cache_salt
    assert cli.main(["keys", "revoke", file, id_of(shown) or ""]) == 0
    assert cli.main(["keys", "list", file]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{key.id}  tenant=paying")
    assert "priority=-1,5  models=fastserve,embed" in first
    assert "  revoked=" in first
    assert "revoked" not in second
    assert key.sha256 not in first


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["add", "--tenant", "a", "--priority-range=5"], "--priority-range: got '5'; allowed: LOW,HIGH"),
        (
            ["add", "--tenant", "a", "--priority-range=5,1"],
            "allowed: LOW,HIGH, two integers with LOW at most HIGH",
        ),
        (["add", "--tenant", "a", "--tokens-per-second=0"], "quota: got {'tokens_per_second': 0.0}"),
        (["add", "--tenant", "a", "--burst-seconds=3"], "at least one of requests_per_second"),
        (["add", "--tenant", ""], "length"),
        (["revoke", "nobody"], "ID: got 'nobody'; allowed: the id of a key that holds"),
        (["list"], "No such file"),
    ],
)
def test_what_the_command_cannot_do_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    file = tmp_path / "keys.json"
    assert cli.main(["keys", words[0], f"--keys-file={file}", *words[1:]]) == 1
    assert sentence in capsys.readouterr().err
    assert not file.exists()
