"""``python -m plm`` is the command ``plm``."""

import sys

from plm.cli import main

if __name__ == "__main__":  # not when a loader's worker process imports the main module
    sys.exit(main())
