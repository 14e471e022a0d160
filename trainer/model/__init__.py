"""Tokenizer, base model, attention, loss and adapters."""
