"""Layers that several codecs share."""
