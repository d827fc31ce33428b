"""OpenAI's API in front of the ensemble: a translation of HTTP requests into those of `fastserve_client`."""
