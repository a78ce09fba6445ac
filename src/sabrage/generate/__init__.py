"""Text from a trained model: caches, decoding and sampling."""
