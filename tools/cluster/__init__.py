"""A real single-node Kubernetes on this machine, built from source and Debian packages, apart from what the host runs."""
