"""Rows in files, and answers to them."""
