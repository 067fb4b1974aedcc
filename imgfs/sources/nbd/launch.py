"""Run as a program: become a server that finds its listening socket as systemd would give it.

    python3 -I -S launch.py PARENT FD WORD...

A program of its own, so that nothing of imgfs runs between fork and exec.  See sd_listen_fds(3).
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
FIRST_FD = 3


def main() -> None:
    parent, fd, words = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    # What imgfs does with signals is not the server's business.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("imgfs has ended")
    if fd == FIRST_FD:
        os.set_inheritable(fd, True)
    else:
        os.dup2(fd, FIRST_FD)
        os.close(fd)
    os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
    for name in ("LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        os.environ.pop(name, None)
    try:
        os.execvp(words[0], words)
    except OSError as exc:
        sys.exit(f"{words[0]}: {exc.strerror}")


main()
