"""LoRA adapters: compared, loaded, placed, kept."""
