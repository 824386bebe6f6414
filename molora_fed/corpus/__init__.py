"""Text to blocks: domains, near-duplicate clusters, splits, packing, contamination."""
