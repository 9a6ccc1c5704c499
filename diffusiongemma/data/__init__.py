"""Examples, tokens and training batches."""
