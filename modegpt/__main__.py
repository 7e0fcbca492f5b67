"""``python -m modegpt``: the main job."""

import sys

from modegpt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
