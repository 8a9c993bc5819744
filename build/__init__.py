"""Checkpoint to ONNX to engine to a version of the model repository."""
