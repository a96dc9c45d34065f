"""The main job in one call."""
