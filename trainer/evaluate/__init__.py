"""Base against tuned on the held-out rows."""
