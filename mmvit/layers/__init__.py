"""Building blocks of the towers, one concept per file; they take numbers and tensors and return tensors."""
