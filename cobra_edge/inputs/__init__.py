"""What a user gives: text (tokenizer, prompt templates) and images (decoding, transforms). No torch."""
