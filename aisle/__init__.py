"""Aisle: product text in, category out. BERT on Triton, called through a thin gRPC client."""

__version__ = "0.1.0"
