"""Examples that run: `python -m rewriter.examples.NAME`."""
