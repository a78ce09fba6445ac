"""Data: where tokens come from, their files, and the order in which a run reads them."""
