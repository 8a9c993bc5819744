"""Pipelines over several stages: the demo, the stages of learning, and the frontier."""
