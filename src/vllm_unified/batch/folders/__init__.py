"""Jobs with folders of files: a Ray Data pipeline."""
