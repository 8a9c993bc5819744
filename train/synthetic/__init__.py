"""The synthetic catalogue that the demo learns from."""
