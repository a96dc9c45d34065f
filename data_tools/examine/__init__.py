"""Reads shards and reports what they hold; changes none of them."""
