"""The quickstart: trains a small tokenizer and generator on handwritten digits, measures them, writes a report."""
