"""``python -m itrain``, and the command ``itrain``."""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    """Run the command line; Ctrl-C while it is being imported is told in a line, too."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        # At once: imports turn an exception into errors of their own.
        signal.signal(signal.SIGINT, lambda signum, frame: (os.write(2, b"itrain: stopped by SIGINT\n"), os._exit(130)))
    if sys.argv[1:2] == ["--complete"]:
        from itrain.completion import candidates

        print("\n".join(candidates(sys.argv[2:])))
        return 0
    try:
        from itrain import cli
    except ModuleNotFoundError as error:
        if (error.name or "itrain").partition(".")[0] == "itrain" or os.environ.get("ITRAIN_DEBUG", "0") not in (
            "",
            "0",
        ):
            raise
        print(f"itrain: {error}; it is not installed whole: pip install --force-reinstall itrain", file=sys.stderr)
        return 1
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
