"""Embeddings on disk, and search in them."""
