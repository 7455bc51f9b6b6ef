"""Scripts and sets: synthetic scenes, the training of cobra-mini, and the suites it is judged and calibrated with."""
