"""Rows in, packed token shards and batches out."""
