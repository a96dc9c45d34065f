"""From images with texts or classes to shards."""
