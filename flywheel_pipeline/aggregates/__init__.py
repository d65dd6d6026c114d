"""Outcome classes, episodes, statistics per rule, and the refresh that keeps them exact."""
