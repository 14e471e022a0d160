"""`make site-check`: looks at a cluster before one trains on it (docs/site-preparation.md)."""
