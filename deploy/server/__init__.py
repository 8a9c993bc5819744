"""Code that starts Triton, supervises it and changes the version that it serves."""
