"""Computes: pure functions of tensors, in which nothing is read by the host."""
