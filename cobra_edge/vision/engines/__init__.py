"""TensorRT engines, for Jetson and for RTX GPUs: build, cache, run."""
