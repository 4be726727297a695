"""What the web apps share: the checks on every request, and the files of every page."""
