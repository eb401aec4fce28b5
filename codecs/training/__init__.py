"""Training: one engine, and each codec's losses."""
