"""Where the rows come from: whatever users hand over, as a source of chunks (`base.ChunkSource`)."""
