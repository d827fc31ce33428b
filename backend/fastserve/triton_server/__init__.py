"""Triton server around the engine: how it is installed, started and watched, and the steps of its ensemble.

The steps' modules import `triton_python_backend_utils`, which exists only inside a stub of Triton server's
Python backend.
"""
