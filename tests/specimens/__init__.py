"""Launches at real shapes, on `meta` tensors, for `compiling.py`: what is compiled ahead of time.

Each module exports `SPECIMENS: dict[str, Callable[[], object]]`; a specimen calls launchers of
`kernels/` in their default configurations, at Gemma 3 27B's sizes unless its name says otherwise.
"""
