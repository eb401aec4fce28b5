"""Judges: models that measure ours and share nothing with them."""
