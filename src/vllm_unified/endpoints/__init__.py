"""One server, used well."""
