"""The CUDA decoder's kernels in Triton, each beside its reference in plain torch of the same signature.

Kernels are launched through `launch.launch`, so that what a decoder launches can be recorded and compiled for GPUs that are
not here. How a kernel cuts its work is data: tiles.toml.
"""

import os

# Triton asks for a choice: a product and a sum may be one instruction. The native decoder fuses too.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
