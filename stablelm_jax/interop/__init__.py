"""Other software's formats: Hugging Face and GGUF, in and out, each checked by that software."""
