"""Measuring the operators: on a GPU their kernels, on a CPU the public functions."""
