"""Sample order, sample sources, batches, transforms, tokenizers, class names and prompt templates."""
