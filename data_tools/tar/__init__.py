"""Bytes of tars by offset; knows no image and no caption."""
