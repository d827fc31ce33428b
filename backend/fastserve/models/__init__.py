"""Models: from token ids and paged KV caches to hidden states and logits.

Read `causal_lm`, the interface, then `decoder` (our own, of the Llama family) with `linear` and `kv_cache`,
and `transformers_model` with `attention_interface` (other models, in transformers' modules). `model_loader`
picks one; `decoder_loader` (with `decoder_tensors`, `lazy_weights`) or `transformers_loader` loads it.
"""
