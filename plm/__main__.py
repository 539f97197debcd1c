"""``python -m plm`` is the command ``plm``."""

import os
import sys

if sys.path[:1] == [os.getcwd()]:  # as for the command, no recipe or checkpoint may name a module of this folder
    del sys.path[0]

from plm.cli import main

if __name__ == "__main__":  # not when a loader's worker process imports the main module
    sys.exit(main())
