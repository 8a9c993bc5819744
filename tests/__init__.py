"""The tests. This runs before any of them is imported."""

import os
import sys

# Many images turn Python's cache of compiled modules off. Then each command that a test runs would compile all of
# PyTorch and Transformers again, for 10 s.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
