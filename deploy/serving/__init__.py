"""Code that runs inside Triton's Python processes."""
