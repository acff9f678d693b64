"""What builds the site is not collected: it imports packages of the extra `docs`."""

collect_ignore = ["_theme"]
