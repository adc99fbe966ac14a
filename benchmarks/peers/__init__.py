"""Clients of OpenAI-compatible servers, side by side, in one run."""
