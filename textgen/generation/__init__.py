"""Generation: transforms of distributions, the scan over a step function, search, speculation, samples."""
