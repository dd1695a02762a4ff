"""What will go wrong: a look at somebody's own project before hours are lost."""
