"""The same question of the newest picture from a camera or a directory, again and again."""
