"""`python -m fastserve_kernels`, which needs no installation."""

import sys

from fastserve_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
