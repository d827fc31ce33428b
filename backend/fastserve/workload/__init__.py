"""What users ask of a server and when: drawn from distributions, or as a trace of real use recorded it."""
