"""Engines of TensorRT, on a Jetson and for RTX GPUs: building, keeping and running them."""
