"""What the command `fastserve-kernels` does; a module each."""
