"""The model in plain torch: the truth that all else is compared with."""
