"""Base against tuned on the held-out rows, and the gate that judges the result."""
