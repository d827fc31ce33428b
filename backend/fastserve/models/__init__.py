"""The models: our own decoder of the Llama family, any other causal model of transformers, their loading."""
