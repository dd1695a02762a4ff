"""The transfer methods, a folder each; none imports another."""
