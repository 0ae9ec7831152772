"""From shards to batches: tar members, images, captions, tokens, in an order that can be resumed exactly."""
