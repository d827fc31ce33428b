"""Load on an engine, in this process or behind a server, in closed and open loops, and what it measured."""
