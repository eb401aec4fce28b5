"""Video codecs and reducers."""
