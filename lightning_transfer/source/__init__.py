"""The second task that rides along: its data, its head, and how its images run through the user's network."""
