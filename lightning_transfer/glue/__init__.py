"""Where this package touches Lightning: nothing outside this folder reads a private attribute of it."""
