"""Text that outgrows memory: token shards on disk, made in parallel, checked by block, streamed in an exact order."""
