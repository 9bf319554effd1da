"""How near generated pieces come to real ones: `excerpts` reads both alike, `features`, `copying` measure."""
