"""Writing vision.onnx: from torch, in a precision, proven against torch."""
