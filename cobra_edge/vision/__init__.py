"""Vision tower and projector as one ONNX graph: export and inference."""
