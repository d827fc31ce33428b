"""Who runs next, and where its KV cache lives. No torch, no Triton server here: it runs in milliseconds."""
