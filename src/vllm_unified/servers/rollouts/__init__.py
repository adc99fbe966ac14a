"""A server takes another one's place: checkpoints, preflight, proof, and the change itself."""
