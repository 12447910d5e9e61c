"""`python -m zimage_cli` is `zimage`."""

import sys

from .app import main

sys.exit(main())
