"""Which run is served, whether its files are whole, and what is said about it."""
