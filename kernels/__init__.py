"""Triton kernels: one kernel and one typed launcher per file, one `<op>.py` per row of the table.

A module is imported when its op is first called, so that importing the package needs no Triton.
Nothing here imports `gemmascope_fast`: the launchers take and return tensors.
"""
