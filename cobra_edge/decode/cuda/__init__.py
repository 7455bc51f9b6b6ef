"""What a decoder on an NVIDIA GPU is made of: whether there is a GPU, weights, states, one token, many tokens."""
