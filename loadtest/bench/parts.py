"""The parts of `aisle bench`. This module imports nothing: the packages of a part may be missing."""

PARTS = ("engines", "services", "scaling", "host", "rest")
DEFAULT = PARTS[:2]
