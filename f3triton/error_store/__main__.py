"""`python -m f3triton.error_store inspect PATH`"""

from __future__ import annotations

import sys

from .disk.inspect import main

if __name__ == "__main__":
    sys.exit(main())
