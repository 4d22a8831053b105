"""ModelReleases: resolve, compress, gate, start the candidate, promote, watch, retire."""
