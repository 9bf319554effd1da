"""`python -m dsmr` is `dsmr`, for launchers that start modules."""

import sys

from dsmr.cli import main

if __name__ == "__main__":
    sys.exit(main())
