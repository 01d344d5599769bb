"""minipeft: head tuning, adapters and LoRA on a small BERT, written to be read. Start with bert.py."""
