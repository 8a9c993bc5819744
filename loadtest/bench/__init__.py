"""Benchmarks: engines, services and host costs side by side."""
