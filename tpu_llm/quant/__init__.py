"""Numbers in fewer bits: `ggml` holds the block formats of llama.cpp's files."""
