"""Sources, annotators, filters and shards."""
