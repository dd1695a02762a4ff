"""Will it help me: trials on somebody's own data."""
