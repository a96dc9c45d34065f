"""Number formats, memory, parallelism and operation counts of the device."""
