"""The same question of the newest image from a camera or a directory, again and again."""
