"""From float weights to quantized tensors."""
