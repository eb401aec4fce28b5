"""Assets: mini weights, samples, data recipes."""
