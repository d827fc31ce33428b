"""Makes a checkpoint smaller and faster: quantize, prune, decompose, distil, and see what it cost."""
