"""What methods are made of: see DESIGN.md for which file is for what."""
