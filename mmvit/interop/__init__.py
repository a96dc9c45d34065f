"""Import and export of weights in the formats of other libraries."""
