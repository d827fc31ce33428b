"""`fastserve keys`: adds, lists and revokes the keys of a server's clients."""

from __future__ import annotations

import argparse
import secrets
import sys
from pathlib import Path
from typing import Any

import msgspec

from fastserve.access.key import Key, PriorityRange, new_key, utc_now
from fastserve.access.keys_file import Keys, KeysFileError, Tenant, edit_keys, read_keys
from fastserve.atomic_write import WriteError
from fastserve.config import TenantQuota

ERRORS = (KeysFileError, WriteError)
SALT_BYTES = 16
QUOTA_FLAGS: dict[str, tuple[type, str]] = {
    "requests_per_second": (float, "requests a second"),
    "tokens_per_second": (float, "tokens a second, of prompts and answers"),
    "tokens_in_flight": (int, "tokens of the prompts and longest answers of requests that wait or run"),
    "requests_in_flight": (int, "requests that wait or run"),
    "burst_seconds": (float, "what the rates give in so many seconds may be used at once (10)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The three commands and their flags."""
    commands = parser.add_subparsers(dest="keys_command", metavar="COMMAND", required=True)
    add = commands.add_parser("add", help="make a key and print it: nobody sees it again")
    add.set_defaults(keys_run=_add)
    _add_file(add)
    add.add_argument("--tenant", required=True, metavar="NAME", help="whose requests those with the key are")
    add.add_argument(
        "--priority-range", metavar="LOW,HIGH", help="of the key's requests (default: the server's)"
    )
    add.add_argument(
        "--models", metavar="NAME,...", help="that the key is for, encoders by their names (default: all)"
    )
    group = add.add_argument_group("of the tenant, all its keys together; what is given replaces what it had")
    for name, (kind, description) in QUOTA_FLAGS.items():
        group.add_argument(
            "--" + name.replace("_", "-"), type=kind, metavar="N", help=description, default=None
        )
    group.add_argument(
        "--own-prefix-cache",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="its prompts are kept apart in the prefix cache, so that nobody can learn from an answer's time "
        "what others have sent (default: as it was; for a new tenant no)",
    )
    listing = commands.add_parser("list", help="the keys that there are, without their secrets")
    listing.set_defaults(keys_run=_list)
    _add_file(listing)
    revoke = commands.add_parser("revoke", help="end a key: a server that runs refuses it within seconds")
    revoke.set_defaults(keys_run=_revoke)
    _add_file(revoke)
    revoke.add_argument("key", metavar="ID", help="the key's id, as `list` has it")


def run(arguments: argparse.Namespace) -> int:
    """Runs one of the three. Raises KeysFileError and WriteError."""
    run_command: Any = arguments.keys_run
    return int(run_command(arguments))


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keys-file", required=True, type=Path, metavar="FILE", help="that `fastserve serve` is given"
    )


def _add(arguments: argparse.Namespace) -> int:
    models = None if arguments.models is None else tuple(arguments.models.split(","))
    shown, key = new_key(arguments.tenant, _priority_range(arguments.priority_range), models)
    with edit_keys(arguments.keys_file) as box:
        tenant = _tenant(arguments, box[0].tenants.get(arguments.tenant, Tenant()))
        box[0] = _checked(box[0].with_key(key, tenant))
    print(shown)
    print(f"key {key.id} of tenant {key.tenant!r}: keep it, it is not shown again", file=sys.stderr)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    keys = read_keys(arguments.keys_file)
    for key in keys.keys:
        print(_line(key, keys.tenants.get(key.tenant, Tenant())))
    return 0


def _revoke(arguments: argparse.Namespace) -> int:
    with edit_keys(arguments.keys_file) as box:
        try:
            box[0] = box[0].revoke(arguments.key, utc_now())
        except KeyError:
            raise KeysFileError(
                f"ID: got {arguments.key!r}; allowed: the id of a key that holds, as `fastserve keys list` "
                "has it"
            ) from None
    print(f"key {arguments.key} is revoked", file=sys.stderr)
    return 0


def _tenant(arguments: argparse.Namespace, before: Tenant) -> Tenant:
    """What the flags say of the tenant, over what was there."""
    given = {name: value for name in QUOTA_FLAGS if (value := getattr(arguments, name)) is not None}
    quota, salt = before.quota, before.cache_salt
    if given:
        try:
            quota = msgspec.convert(given, TenantQuota)
        except msgspec.ValidationError as error:
            raise KeysFileError(f"quota: got {given}: {error}") from error
    if arguments.own_prefix_cache is not None:
        salt = (salt or secrets.token_hex(SALT_BYTES)) if arguments.own_prefix_cache else ""
    return Tenant(quota=quota, cache_salt=salt)


def _priority_range(text: str | None) -> PriorityRange | None:
    if text is None:
        return None
    try:
        low, high = map(int, text.split(","))
        if low > high:
            raise ValueError
    except ValueError:
        raise KeysFileError(
            f"--priority-range: got {text!r}; allowed: LOW,HIGH, two integers with LOW at most HIGH"
        ) from None
    return low, high


def _checked(keys: Keys) -> Keys:
    """What a server will read. Raises KeysFileError for what it would refuse."""
    try:
        return msgspec.json.decode(msgspec.json.encode(keys), type=Keys)
    except msgspec.ValidationError as error:
        raise KeysFileError(str(error)) from error


def _line(key: Key, tenant: Tenant) -> str:
    parts = [key.id, f"tenant={key.tenant}", f"created={key.created}"]
    if key.priority_range is not None:
        parts.append("priority={},{}".format(*key.priority_range))
    if key.models is not None:
        parts.append(f"models={','.join(key.models)}")
    if tenant.quota is not None:
        parts.append(f"quota={msgspec.json.encode(tenant.quota).decode()}")
    if tenant.cache_salt:
        parts.append("own-prefix-cache")
    if key.revoked is not None:
        parts.append(f"revoked={key.revoked}")
    return "  ".join(parts)
