"""Vision tower and projector as one ONNX graph: writing it, and running it."""
