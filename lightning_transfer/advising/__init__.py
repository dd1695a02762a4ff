"""Will it help me: trials on your own data."""
