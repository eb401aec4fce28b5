"""Backbone: one transformer for all streams."""
