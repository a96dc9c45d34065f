"""Evaluation of trained models: embedding, classification, zero-shot classification, inspection."""
