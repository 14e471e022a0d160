"""Memory, network and time of a run, predicted without a GPU."""
