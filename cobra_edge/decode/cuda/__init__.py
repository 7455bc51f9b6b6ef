"""What a decoder on an NVIDIA card is made of: whether there is a card, weights, states, one token, many tokens."""
