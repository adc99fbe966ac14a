"""The endpoints: a file per family, a function per route."""
