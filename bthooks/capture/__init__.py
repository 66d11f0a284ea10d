"""Sees: hooks and the dispatch mode, for one forward or one step of an optimizer."""
