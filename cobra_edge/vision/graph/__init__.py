"""Export of vision.onnx from torch, in a precision, checked against torch."""
