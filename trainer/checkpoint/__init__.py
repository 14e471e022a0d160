"""Asynchronous, atomic, sharded checkpoints that any world size loads."""
