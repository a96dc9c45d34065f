"""Tools for shards, without torch or mmvit: tar index, reader, writer, data sources and the `mmvit-data` program."""
