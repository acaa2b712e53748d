"""Module passes over the dialect, one a file."""
