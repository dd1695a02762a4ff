"""Train a second task with the target: its data, its head, and how its images run through the user's network."""
