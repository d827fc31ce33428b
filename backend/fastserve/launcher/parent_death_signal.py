"""Ends a program with its parent: `python parent_death_signal.py PARENT_PID PROGRAM ARGUMENTS...`.

The kernel kills PROGRAM when the thread that started it ends, even by `kill -9`. Run by its path, before the
program takes this process's place: a `preexec_fn` would do the same, but not safely beside other threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Becomes PROGRAM, which the kernel kills when its parent ends. Raises OSError."""
    parent, program = int(sys.argv[1]), sys.argv[2]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # A parent that ended before the call above will send no signal any more.
    if os.getppid() == parent:
        os.execv(program, sys.argv[2:])


if __name__ == "__main__":
    main()
