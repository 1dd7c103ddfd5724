"""Triton kernels, one kernel and one typed launcher per file; importable without Triton."""
