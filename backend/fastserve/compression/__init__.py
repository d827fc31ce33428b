"""Makes a checkpoint smaller and faster: quantise, prune, decompose, distil, and see what it cost."""
