"""What runs on an operator's machine: local cluster, images, charts, promotion."""
