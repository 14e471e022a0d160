"""HTTP: the OpenAI-compatible API, health, metrics, reports."""
