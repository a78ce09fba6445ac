"""Reports on runs and results: pages and tables; reads run folders only and imports no torch."""
