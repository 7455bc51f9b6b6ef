"""Formats of stored values: schemes, recipes, packing, rotations, safetensors and ONNX files, targets. No torch."""
