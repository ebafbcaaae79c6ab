"""`python -m alisa_compile` is the `alisa` command."""

from __future__ import annotations

import sys

from .tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
