"""What servers serve: information, statistics, adapters, quantization."""
