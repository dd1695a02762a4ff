"""Will it help me: what is measured on somebody's own data, and what the matrix of benchmarks says of such data."""
