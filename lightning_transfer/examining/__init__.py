"""Find what will go wrong in a project before hours are lost."""
