"""Reads shards and reports what they contain, without changing them."""
