"""Become another program that the kernel kills as soon as the process that started us is gone.

Run as a script: `python -I -S shim.py PARENT_PID PROGRAM ARGUMENT...`. It stands between `finetune run` and a pod's
process, since a preexec_fn is not safe in a program with threads. The death signal survives the exec.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    parent, program = int(arguments[0]), arguments[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before the request above
        os._exit(1)
    os.execv(program[0], program)


if __name__ == "__main__":
    main(sys.argv[1:])
