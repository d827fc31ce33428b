"""Encoder models: embeddings, classification and reranking of texts, over ragged batches."""
