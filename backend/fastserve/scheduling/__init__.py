"""Who runs next, and where its KV cache lives. No torch and no Triton server here: it runs in milliseconds."""
