"""Many workers, the bits of one: stages on several workers, and batches in several parts."""
