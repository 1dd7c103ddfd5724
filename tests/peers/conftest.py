"""What the installed libraries need before they are imported."""

import os

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its CPU path, chosen at import
os.environ.setdefault("WANDB_MODE", "disabled")
