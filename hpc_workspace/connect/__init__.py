"""Ways to the door: `streams` says what they have in common, `ladder` tries them in order."""
