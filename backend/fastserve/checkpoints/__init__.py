"""Checkpoints: from what a user names to weights in our formats, whatever tool wrote them.

Read first `model_files`, `model_metadata` and `checkpoint`, the interface, then its implementations:
`safetensors_checkpoint`, `compressed_checkpoint` (a `*_layout` per quantization), `gguf_checkpoint`.
`decoder_config` and `gguf_config` describe a model; `online_quantization` and `weight_rows` alter weights.
"""
