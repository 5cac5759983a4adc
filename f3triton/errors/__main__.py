"""`python -m f3triton.errors inspect PATH`"""

from __future__ import annotations

import sys

from .inspect import main

if __name__ == "__main__":
    sys.exit(main())
