"""What each model of the ensemble does first."""

from __future__ import annotations

from fastserve.config import Config, read_config
from fastserve.ensemble.server_death import leave_with_server
from fastserve.ensemble.shared_secret import server_secret


def start_model() -> Config:
    """Ties this process to its server, and reads the settings."""
    leave_with_server()
    server_secret()  # made while there is shared memory for it
    return read_config()
