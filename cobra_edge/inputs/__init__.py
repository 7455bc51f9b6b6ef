"""Inputs of the model: text (tokenizer, prompt templates) and images (decoding, transforms). No torch."""
