"""Define the command line `lightning-transfer`, and read the projects that it is given."""
