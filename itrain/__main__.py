"""``python -m itrain``."""

import sys

from itrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
