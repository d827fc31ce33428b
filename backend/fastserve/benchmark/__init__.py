"""Closed-loop load on an engine, inside this process or behind a server, and what it measured."""
