"""Data recipes: one file a source."""
