"""How Aisle runs: a local Triton here, containers and Kubernetes in the files beside."""
