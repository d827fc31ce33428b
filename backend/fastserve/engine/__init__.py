"""The engine: takes the scheduler's step plan, computes it, and says what came of it. torch lives here."""
