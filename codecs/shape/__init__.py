"""Shape codecs."""
