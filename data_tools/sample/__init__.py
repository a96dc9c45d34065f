"""What one sample is: its image, caption, metadata and label, from bytes."""
