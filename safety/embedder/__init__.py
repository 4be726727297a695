"""Sentence embeddings without a network: all-MiniLM-L6-v2."""
