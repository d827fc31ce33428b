"""Scheduling simulated: what a step of the engine takes, and what follows from that."""
