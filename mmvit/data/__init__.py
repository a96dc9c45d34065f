"""Sample order, the indexed dataset, decoding, transforms, tokenizers, class names and prompt templates."""
