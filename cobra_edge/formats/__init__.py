"""What a stored value is: schemes, recipes, packing, rotations, safetensors and ONNX files, targets. No torch."""
