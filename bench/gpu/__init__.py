"""Parts of `gpu_check.py`: each measures or checks one thing, and writes what it finds at once."""
