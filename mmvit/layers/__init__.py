"""Building blocks of the towers: one concept a file, numbers and tensors in, tensors out."""
