"""Writes chosen samples of shards as new shards."""
