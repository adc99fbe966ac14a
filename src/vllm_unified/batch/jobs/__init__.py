"""Rows of a file and their answers in another, and nothing lost in between."""
