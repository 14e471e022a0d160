"""Serves a fine-tuned model: guarded, attributed, OpenAI-compatible."""
