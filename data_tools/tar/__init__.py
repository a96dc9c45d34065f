"""Reads and writes tar files by byte offset, independent of their content."""
