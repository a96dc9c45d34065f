"""Everything about shards that needs neither torch nor mmvit: tar index, writer, sources, the `mmvit-data` program."""
