"""Code for GPUs that are not here is generated in a process of its own (`../test_generated.py`): torch is told of a
CUDA device there, which it cannot forget again."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("ALISA_TEST_GENERATED") == "1" else ["test_*.py"]
