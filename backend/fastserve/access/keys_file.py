"""The file of keys and of what their tenants may use: JSON, readable by its owner only.

{"tenants": {"paying": {"quota": {"requests_per_second": 50}}},
 "keys": [{"id": "4f0c12ab90de", "sha256": "...", "tenant": "paying", "created": "..."}]}
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from fastserve.access.key import Key
from fastserve.atomic_write import atomic_write
from fastserve.config import TenantQuota

MODE = 0o600
MAX_BYTES = 1 << 26
"""A file beyond it is no file of keys: 100,000 of them take 30 MB."""


class KeysFileError(Exception):
    """A keys file that cannot be used; the sentence names the path and what is wrong."""


class Tenant(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What all keys of one tenant share."""

    quota: TenantQuota | None = None
    """None: that of `--tenant-quotas`, if there is one."""
    cache_salt: str = ""
    """Part of the hashes of its prompts' KV blocks: no other tenant finds them in the prefix cache, nor
    learns from an answer's time that they are there. Empty: shared with all who have none."""


class Keys(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a keys file holds."""

    tenants: dict[Annotated[str, Meta(min_length=1, max_length=128)], Tenant] = {}
    keys: tuple[Key, ...] = ()

    def __post_init__(self) -> None:
        if len({key.id for key in self.keys}) < len(self.keys):
            raise ValueError("`keys`: got one id twice; allowed: each once")

    def with_key(self, key: Key, tenant: Tenant | None = None) -> Keys:
        """The same with one more key; `tenant`, if given, takes the place of what its tenant had."""
        tenants = self.tenants if tenant is None else self.tenants | {key.tenant: tenant}
        return Keys(tenants=tenants, keys=(*self.keys, key))

    def revoke(self, key_id: str, when: str) -> Keys:
        """The same without that key. Raises KeyError for an id that is not there, or was revoked before."""
        if not any(key.id == key_id and key.revoked is None for key in self.keys):
            raise KeyError(key_id)
        keys = (msgspec.structs.replace(key, revoked=when) if key.id == key_id else key for key in self.keys)
        return Keys(tenants=self.tenants, keys=tuple(keys))


def read_keys(path: Path) -> Keys:
    """What the file holds. Raises KeysFileError, also where others than its owner may read or write it."""
    try:
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            if stat.S_IMODE(state.st_mode) & 0o077:
                mode = stat.S_IMODE(state.st_mode)
                raise KeysFileError(f"{path}: its mode is {mode:o}; allowed: {MODE:o}, only its owner's")
            return msgspec.json.decode(file.read(MAX_BYTES), type=Keys)
    except OSError as error:
        raise KeysFileError(f"{path}: cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise KeysFileError(f"{path}: {error}") from error


@contextmanager
def edit_keys(path: Path) -> Iterator[list[Keys]]:
    """Gives what the file holds (nothing, where there is none yet), in a list of one; what that list holds
    when the block ends is written, whole or not at all. One process does so at a time.

    Raises KeysFileError and WriteError.
    """
    try:
        lock = os.open(path.with_name(f"{path.name}.lock"), os.O_WRONLY | os.O_CREAT, MODE)
    except OSError as error:
        raise KeysFileError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        box = [read_keys(path) if path.exists() else Keys()]
        yield box
        content = msgspec.json.format(msgspec.json.encode(box[0]), indent=2)
        with atomic_write(path, len(content), MODE) as unfinished:
            unfinished.write_bytes(content)
    finally:
        os.close(lock)
