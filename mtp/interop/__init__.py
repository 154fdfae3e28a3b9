"""Models of others: read, written, or decoded as they are."""
