"""Judges: numbers on the host in, findings and alerts out."""
