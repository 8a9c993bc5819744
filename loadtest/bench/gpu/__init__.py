"""`aisle bench gpu`: all GPU measurements with one command, in a few minutes."""
