"""Pruning: fewer visual tokens before the model, between its layers, or in its cache."""
