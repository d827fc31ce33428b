"""Who may use a server, and what is written down of it: keys, credentials, the request log, masking."""
