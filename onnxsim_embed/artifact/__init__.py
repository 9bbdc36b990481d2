"""The exported model directory: manifest, integrity, choice of precision, cache, recipes."""
