"""Engines of TensorRT, on a Jetson and for RTX cards: building, keeping and running them."""
