"""Several servers, used as one."""
