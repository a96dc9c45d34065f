"""Image and text towers; each returns a `TowerOutput`."""
