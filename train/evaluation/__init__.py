"""Evaluate a model, compare it with baselines, and explain its predictions."""
