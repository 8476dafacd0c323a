"""The commands of `manta`, a family a file, with what they print beside them."""
