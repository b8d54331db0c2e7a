"""The second engine: torch runs a Hugging Face checkpoint layer by layer, forwards and backwards."""
