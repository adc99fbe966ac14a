"""What crosses HTTP: request bodies, typed answers, server-sent events, connections."""
