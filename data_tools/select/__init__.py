"""Selects samples of shards and writes them as new shards."""
