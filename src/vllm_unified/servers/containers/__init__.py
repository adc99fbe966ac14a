"""vLLM in containers: through Docker's API, behind the same interface as a local process."""
