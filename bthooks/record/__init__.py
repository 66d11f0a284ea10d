"""Writes: the only wing in which numbers leave the device or the process."""
