"""Networks of other projects' formats."""

from tvmatch.interop.authors import network_from_authors, network_to_authors

__all__ = ["network_from_authors", "network_to_authors"]
