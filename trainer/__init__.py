"""Fine-tunes Llama models on unequal GPUs: prepare, train, export, evaluate, report."""
