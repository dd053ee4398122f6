"""Train the two-head MNIST network on Ray and score Parquet with it; every row is counted."""

__version__ = "0.1.0"
