"""Quantizers: vector, finite scalar, binary and residual."""
