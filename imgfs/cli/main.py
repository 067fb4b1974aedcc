"""The entry point of `imgfs`."""

from __future__ import annotations

import sys

from imgfs.cli import standard


def main() -> None:
    """Run the command; its status is the process's."""
    # First of all: what is opened later must not be given the number of a closed one.
    standard.open_closed()
    standard.take_over()
    from imgfs.cli.group import run

    status: int | str | None = 1
    try:
        status = run()
    except SystemExit as exc:
        status = exc.code
    except (OSError, ExceptionGroup):
        if standard.failure() is None:
            raise
    sys.exit(standard.finish(status))


if __name__ == "__main__":
    main()
