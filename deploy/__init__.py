"""How Aisle runs: code around a local Triton, and files for containers and Kubernetes."""
