"""Text to token ids and back: what `preprocess` and `postprocess` do. Nothing here imports torch."""
