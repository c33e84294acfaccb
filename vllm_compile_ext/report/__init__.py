"""A recorded start for people: on a terminal, as a page, as a Chrome trace; all made from `facts.facts`."""
