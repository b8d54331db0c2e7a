"""The model as a file and as numbers: GGUF in and out, GGML types, architecture, conversion."""
