"""Generators: how ids are drawn, and the any-to-any pipeline."""
