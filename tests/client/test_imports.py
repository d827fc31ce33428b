"""The client is light."""

from __future__ import annotations

import subprocess
import sys


def test_the_client_loads_neither_torch_nor_the_server_side() -> None:
    program = (
        "import sys, fastserve_client\n"
        "heavy = {'torch', 'transformers', 'fastserve', 'fastserve_kernels'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
