"""The keys as a running server knows them: read again when their file changes, so that revoked ones stop."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fastserve.access.key import Key, id_of
from fastserve.access.keys_file import Keys, KeysFileError, Tenant, read_keys
from fastserve.config import TenantQuota
from fastserve.errors import ErrorCode, RequestError

logger = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
"""Between two looks at whether the file has changed: a revoked key stops within it."""
NO_TENANT = Tenant()
_NO_KEY = Key(id="", sha256="0" * 64, tenant="-", created="")
"""Compared with where no key has the id that is shown, so that this takes as long as a wrong secret."""


class Keyring:
    """The keys in a file. Threads may share one.

    While the file cannot be read, nobody is let in: an operator who takes it away means that.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises KeysFileError."""
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._problem: str | None = None
        self._version = self._stat()
        self._next_check = clock() + CHECK_SECONDS
        self._take(read_keys(path))

    def find(self, shown: str) -> Key | None:
        """The key that a client shows, if it is one of the file that holds.

        Raises RequestError (UNAVAILABLE) while the file cannot be read.
        """
        self.refresh()
        self._check_readable()
        key = self._keys.get(id_of(shown) or "", _NO_KEY)
        return key if key.matches(shown) and key.revoked is None else None

    def holds(self, key_id: str) -> bool:
        """Whether a key that was found before held still at the last `refresh`. Raises as `find`."""
        self._check_readable()
        key = self._keys.get(key_id)
        return key is not None and key.revoked is None

    def _check_readable(self) -> None:
        if self._problem is not None:
            raise RequestError(
                "keys cannot be checked now: the server's keys file cannot be read", ErrorCode.UNAVAILABLE
            )

    def tenant(self, name: str) -> Tenant:
        """What the file says of a tenant."""
        return self._tenants.get(name, NO_TENANT)

    @property
    def quotas(self) -> Mapping[str, TenantQuota]:
        """The quotas that the file gives, by tenant."""
        return self._quotas

    def refresh(self) -> bool:
        """Reads the file again if it is time and it has changed; returns whether it was read."""
        with self._lock:
            now = self._clock()
            if now < self._next_check:
                return False
            self._next_check = now + CHECK_SECONDS
            version = self._stat()
            if version == self._version:
                return False
            self._version = version
            try:
                self._take(read_keys(self._path))
            except KeysFileError as error:
                logger.error("nobody is let in until the keys can be read: %s", error)
                self._problem = str(error)
                return False
            self._problem = None
            return True

    def _take(self, keys: Keys) -> None:
        self._keys = {key.id: key for key in keys.keys}
        self._tenants = keys.tenants
        self._quotas = {
            name: tenant.quota for name, tenant in keys.tenants.items() if tenant.quota is not None
        }

    def _stat(self) -> tuple[int, ...] | None:
        """What differs between two files of that name, and when one is changed in place; None: no file."""
        try:
            state = os.stat(self._path)
        except OSError:
            return None
        return state.st_ino, state.st_mtime_ns, state.st_ctime_ns, state.st_size
