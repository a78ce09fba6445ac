"""The language model: embedding, blocks, wiring and head put together, and what it costs."""
