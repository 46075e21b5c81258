"""What is read and written safely: atomic folders, checked places, bounded JSON."""
