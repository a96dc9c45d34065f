"""What a trained model is worth: embedding, zero-shot classification."""
